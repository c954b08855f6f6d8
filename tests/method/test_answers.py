"""Reading, comparing and counting final answers."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cat_grpo
from cat_grpo.method import equivalence
from cat_grpo.method.answers import (
    Vote,
    agreements,
    clusters,
    extract_answer,
    majority,
    rollout_answers,
    same_answer,
    votes_of,
)
from cat_grpo.method.equivalence import equal_text, equivalent, read_timeouts
from cat_grpo.records import Group
from scripting import boxes, group, problem, reference, wrote

ENDLESS = "9^{9^{9^{9}}}"  # sympy would first write out the number


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints; nothing may go to stderr."""
    environment = os.environ | {"PYTHONPATH": str(Path(cat_grpo.__file__).parents[1])}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    return run.stdout


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed {3}", "3"),
        ("\\boxed\n  { 4 }", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces are content
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x \boxed{6} y}", "6"),
        (r"{ \boxed{7}", "7"),  # what is open around a box does not matter
        (r"} \boxed{8}", "8"),
        (r"\\boxed{9}", "9"),  # escaped once too often, as if in JSON
        ("\\boxed{line\nbreak}", "line\nbreak"),
        (r"\boxed{10} and then \boxed{11", "10"),  # cut off: the last balanced box counts
        (r"\boxed{10} and then \boxed{\frac{11}{1", "10"),
        (r"\boxed{ {12 }", None),
        (r"\boxed{13} then \boxed{}", None),  # the last word was nothing
        (r"\boxed{ }", None),
        (r"\boxed", None),
        (r"\fbox{14}", None),
        (r"\boxedness{15}", None),
        ("the answer is 16", None),  # no falling back to the last number
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, answer):
    assert extract_answer(text) == answer


def test_a_huge_text_is_read_in_linear_time():
    n = 100_000
    began = time.perf_counter()
    assert extract_answer(r"\boxed{" * n) is None
    assert extract_answer("{" * n + r"\boxed{1}" + "}" * n) == "1"
    assert extract_answer(r"\boxed{" * n + "1" + "}" * n) == "1"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("a", "b"), [("1, 2", "1,2"), (" a  b\n", "a b"), ("( 1 )", "(1)"), ("x + 1", "x+1")]
)
def test_text_is_equal_up_to_white_space(a, b):
    assert equal_text(a, b)


@pytest.mark.parametrize(("a", "b"), [("12 3", "1 23"), ("2 1/2", "21/2"), ("a", "A"), (r"\pi r", r"\pir")])
def test_white_space_between_words_counts(a, b):
    assert not equal_text(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac34", "3/4"),
        ("x+1", "1+x"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("x=5", "5"),
        ("(1,2)", "1<x<2"),  # by math-verify only from the right to the left
        ("(1, 2)", "(1,2)"),
        (r"\{1,2\}", r"\{2,1\}"),  # a set has no order
        (r"\text{yes}", "yes"),
        (r"\text{(A)}", "A"),
        (r"5 \text{ cm}", "5"),  # units are dropped
        (r"90^\circ", "90"),
        (r"\$5", "5"),
        ("1,000", "1000"),
    ],
)
def test_equal_in_mathematics(a, b):
    assert equivalent(a, b)
    assert equivalent(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("(1,2)", "(2,1)"),  # a tuple has
        ("[1,2]", "(1,2)"),
        ("1/3", "0.333"),
        ("x", "y"),
        (r"\text{yes}", r"\text{no}"),
        ("5 or so, I think", "5"),  # no number is picked out of a text
        ("", "0"),
        (r"\frac{1}{", "1"),
        ("}}{{", "1"),
        ("}} 5 {{", "5"),
        ("\ud800 \x00 \u202e", "1"),
        ('"], "os": [', "1"),
        ("__import__('os').abort()", "1"),
    ],
)
def test_different_in_mathematics(a, b):
    assert not equivalent(a, b)
    assert not equivalent(b, a)


def test_an_endless_comparison_is_cut_off_and_counted_once(monkeypatch, caplog):
    monkeypatch.setattr(equivalence, "TIME_LIMIT_S", 1)
    read_timeouts()
    assert not equivalent(ENDLESS, "1")
    assert read_timeouts() == 1
    assert "not shown equal" in caplog.text
    assert equivalent("2^{10}", "1024")  # the worker has been replaced
    assert not equivalent("1", ENDLESS)  # remembered
    assert read_timeouts() == 0


def test_threads_under_a_running_loop_get_their_own_replies():
    async def compare(n: int) -> list[bool]:
        return await asyncio.gather(
            *(asyncio.to_thread(equivalent, f"{i}+1", str(i + 1 + i % 2)) for i in range(n))
        )

    assert asyncio.run(compare(40)) == [i % 2 == 0 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: equivalent(f"3*{i}", str(3 * i)), range(100, 140)))


def test_a_worker_that_died_idle_is_replaced():
    assert equivalent("7*7", "49")
    for worker in list(equivalence._pool.queue):
        if worker is not None:
            worker.kill()
            worker.wait()
    assert equivalent("7*8", "56")


@pytest.fixture
def own_pool():
    """A pool without workers and without memory; the workers of the other tests come back afterwards."""
    pool = equivalence._pool
    equivalence._new_pool()
    equivalence._shown_equal.cache_clear()
    yield
    equivalence._close_pool()
    equivalence._pool = pool


def test_a_worker_that_cannot_start_is_an_error_every_time(monkeypatch, own_pool):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(equivalence.NUM_WORKERS + 1):  # no place in the pool is lost either
        with pytest.raises(RuntimeError, match="did not start: exit status 1"):
            equivalent("10+1", "11")
    monkeypatch.undo()
    assert equivalent("10+1", "11")


def test_without_math_verify_nothing_is_judged(monkeypatch, own_pool, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start"):
        equivalent("10+2", "12")


def test_what_a_library_prints_is_no_verdict(monkeypatch, own_pool, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "print('true')\n"
        "LatexExtractionConfig = dict\n"
        "def parse(text, *_): print('true'); return text\n"
        "def verify(a, b, timeout_seconds): print('true'); return a == b\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not equivalent("1", "2")


def test_a_worker_killed_from_outside_is_an_error(monkeypatch, own_pool):
    ask = equivalence._ask

    def killed_meanwhile(worker, request):
        if ENDLESS in request:
            threading.Timer(0.2, worker.kill).start()
        return ask(worker, request)

    monkeypatch.setattr(equivalence, "_ask", killed_meanwhile)
    with pytest.raises(RuntimeError, match="exit status -9"):
        equivalent(ENDLESS, "10+3")


def test_an_interrupted_comparison_leaves_no_reply_behind(monkeypatch, own_pool):
    ask = equivalence._ask

    def interrupted(worker, request):
        if "10+4" not in request:
            return ask(worker, request)
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(equivalence, "_ask", interrupted)
    assert equivalent("10+3", "13")
    with pytest.raises(KeyboardInterrupt):
        equivalent("10+4", "14")
    assert not equivalent("10+5", "16")  # and not the "true" of the pair before


def test_a_forked_process_has_workers_of_its_own():
    assert equivalent("11+1", "12")
    child = os.fork()
    if child == 0:
        os._exit(0 if all(w is None for w in equivalence._pool.queue) and equivalent("11+2", "13") else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_no_import_of_the_callers_script_and_no_worker_left_behind(tmp_path):
    script = tmp_path / "script.py"  # without a __main__ guard
    script.write_text(
        "print('started')\n"
        "from cat_grpo.method import equivalence\n"
        "assert equivalence.equivalent('1+1', '2')\n"
        "print(equivalence._pool.queue[-1].pid)\n"
    )
    started, pid = run_python(str(script)).split()
    assert started == "started"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_no_heavy_library_in_the_calling_process():
    code = (
        "import sys; from cat_grpo.method import answers, equivalence; equivalence.equivalent('1+1', '2');"
        "print([name for name in ('math_verify', 'sympy', 'torch') if name in sys.modules])"
    )
    assert run_python("-c", code) == "[]\n"


def test_clusters_by_size_then_first_appearance():
    found = clusters(["b", None, "a", "c", "a", None, "c"], equal_text)
    assert found == [[2, 4], [3, 6], [0]]


def test_clusters_are_classes_of_equivalence_not_of_text():
    assert clusters(["0.5", "2", r"\frac12", "1/2"], equivalent) == [[0, 2, 3], [1]]


@pytest.mark.parametrize(
    ("group", "vote"),
    [
        (["2", "1", "1"], Vote("1", 2, False)),
        (["2", "1", "1", "2"], Vote("2", 2, True)),
        (["3", None, None, None], Vote("3", 1, False)),  # what was not parsed does not vote
        ([None, None], Vote(None, 0, False)),
        ([], Vote(None, 0, False)),
    ],
)
def test_majority(group, vote):
    assert majority(group, equal_text) == vote


def test_the_mode_chooses_the_comparison():
    assert same_answer("math")("1/2", "0.5")
    assert not same_answer("string")("1/2", "0.5")


def test_a_rollout_has_an_answer_where_one_is_asked_for_and_it_came_to_its_end():
    rollouts = (wrote(r"\boxed{1}"), wrote(r"\boxed{1}", "length"), wrote("1"))
    assert rollout_answers(Group(problem(), (1,), rollouts)) == ["1", None, None]
    assert rollout_answers(Group(problem("open"), (1,), rollouts)) == [None, None, None]


async def test_groups_are_compared_in_order_and_off_the_event_loop(monkeypatch):
    """A comparison may take seconds, in which no request would be answered."""
    threads = set()

    def same(a: str, b: str) -> bool:
        threads.add(threading.get_ident())
        return a == b

    monkeypatch.setattr("cat_grpo.method.answers.same_answer", lambda mode: same)
    groups = [group(*boxes(1, 2, 2)), group(*boxes(3), "unread", *boxes(3)), group("unread", *boxes(4, 4))]
    votes = await votes_of(groups, "string")
    assert votes == [Vote("2", 2, False), Vote("3", 2, False), Vote("4", 2, False)]
    references = [reference(r"\boxed{1}"), reference(None), reference(r"\boxed{4}")]
    agrees = await agreements(groups, references, "string")
    assert agrees == [[True, False, False], [None, None, None], [False, True, True]]
    assert threads
    assert threading.get_ident() not in threads
