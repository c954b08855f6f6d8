"""Mathematical equality of answers, as math-verify shows it.

The texts are a model's and are not trusted: sympy can be made to compute for ever. So math-verify runs in
worker processes, each under a clock that the kernel keeps. Its own clock is `signal.alarm`, which raises
outside the main thread, and there every comparison would come out as not equal.
"""

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from queue import LifoQueue

log = logging.getLogger(__name__)

TIME_LIMIT_S = 5
"""Wall-clock seconds for one comparison. One that is worth having takes a hundredth of that."""
NUM_WORKERS = min(8, os.cpu_count() or 1)
"""Most workers at once; each starts when it is first needed and takes about 60 MB."""


def equal_text(a: str, b: str) -> bool:
    """Whether two answers are equal up to white space, which counts only between two words or numbers:
    `1 23` is not `12 3`."""
    return _normal_spaces(a) == _normal_spaces(b)


def equivalent(a: str, b: str) -> bool:
    """Whether two answers are equal as text, or shown to be mathematically equal by math-verify.

    Symmetric; blocks its thread. A pair that takes longer than TIME_LIMIT_S is not shown to be equal: False,
    logged and counted. A fault of ours (a worker that does not start or ends by itself) is a RuntimeError
    and never False.
    """
    return equal_text(a, b) or _shown_equal(*sorted((a, b)))


def read_timeouts() -> int:
    """Returns how many pairs this process has given up on since the last call."""
    global _num_timeouts
    with _count:
        number, _num_timeouts = _num_timeouts, 0
    return number


def _normal_spaces(text: str) -> str:
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


# The pool: idle workers on top of a stack, None where none has been started yet.

_Worker = subprocess.Popen[str]
_pool: LifoQueue[_Worker | None] = LifoQueue()
_num_timeouts = 0
_count = threading.Lock()


@lru_cache(maxsize=65536)
def _shown_equal(a: str, b: str) -> bool:
    worker = _pool.get()
    try:
        if worker is not None and worker.poll() is not None:  # it died while it was idle
            _stop(worker)
            worker = None
        worker = worker or _start_worker()
        reply = _ask(worker, json.dumps([TIME_LIMIT_S, a, b]))
    except BaseException:  # also Ctrl-C: the worker's next reply would be to this pair
        _pool.put(None)
        if worker is not None:
            _stop(worker)
        raise
    if reply:
        _pool.put(worker)
        return json.loads(reply)
    _pool.put(None)
    worker.communicate()
    # The clock, or the stack of the C code below: the pair's own doing. Any other end is not.
    if worker.returncode not in (-signal.SIGALRM, -signal.SIGSEGV):
        raise RuntimeError(f"a math-verify worker ended with exit status {worker.returncode}")
    _count_timeout(a, b)
    return False


def _start_worker() -> _Worker:
    # A script of its own, so that nobody's __main__ is imported again; -P: this folder is no import path.
    # In a session of its own, so that Ctrl-C reaches the run and not its workers.
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    if _ask(worker, json.dumps([0, "1", "1"])) != "true\n":
        _stop(worker)
        raise RuntimeError(f"a math-verify worker did not start: exit status {worker.returncode}, see stderr")
    return worker


def _ask(worker: _Worker, request: str) -> str:
    """The worker's reply line, empty when it ended."""
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return worker.stdout.readline()


def _stop(worker: _Worker) -> None:
    worker.kill()
    worker.communicate()


def _count_timeout(a: str, b: str) -> None:
    global _num_timeouts
    with _count:
        _num_timeouts += 1
    log.warning("not shown equal in %d s: %.80r and %.80r", TIME_LIMIT_S, a, b)


def _new_pool() -> None:
    global _pool
    _pool = LifoQueue()
    for _ in range(NUM_WORKERS):
        _pool.put(None)


def _close_pool() -> None:
    while not _pool.empty():
        if worker := _pool.get_nowait():
            _stop(worker)


_new_pool()
os.register_at_fork(after_in_child=_new_pool)  # two processes on one pipe would read each other's replies
atexit.register(_close_pool)


def _serve() -> None:
    """The worker: a line `[seconds, a, b]` in, a line `true` or `false` out. The clock's signal ends it."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own clock is off
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # LaTeX alone: the reader of plain expressions would take any number out of a text that it cannot read.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    for line in sys.stdin:
        seconds, *answers = json.loads(line)
        signal.alarm(seconds)
        a, b = (parse(rf"\boxed{{{answer}}}", config, "first_match", "first_match", 0) for answer in answers)
        equal = verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
