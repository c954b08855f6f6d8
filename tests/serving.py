"""Servers of vLLM, as a user starts them, for as long as a test needs them."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asking import ADAPTED

ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
FLAGS = (
    "--served-model-name lab --host 127.0.0.1 --dtype float32 --enforce-eager --block-size 32"
    " --generation-config vllm --no-enable-chunked-prefill --logprobs-mode processed_logprobs"
    " --enable-prompt-tokens-details --enable-lora --max-lora-rank 16"
    f" --lora-target-modules {' '.join(ADAPTED)}"
)
READY = "Application startup complete"


@contextmanager
def serve(model: Path, servers: int) -> Iterator[list[str]]:
    """The URLs of this many, started side by side."""
    with ExitStack() as stack:
        started = [stack.enter_context(start(model)) for _ in range(servers)]
        yield [server.url for server in started if server.is_ready()]


class Server:
    """One, from its start to its end."""

    def __init__(self, model: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        # What `vllm serve` runs: that command asks for the package's version by a name that vllm-cpu has not.
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command = [*program, "--model", str(model), "--port", str(port), *FLAGS.split()]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._said: list[str] = []
        self._decided = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def is_ready(self) -> bool:
        """True once it is; AssertionError with its last words where it has ended."""
        self._decided.wait()
        assert any(READY in line for line in self._said), "".join(self._said[-20:])
        return True

    def kill(self) -> None:
        """With all that it has started, and without a word."""
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._said.append(line)
                if READY in line:
                    self._decided.set()
        self._decided.set()


@contextmanager
def start(model: Path, port: int | None = None) -> Iterator[Server]:
    server = Server(model, port or free_port())
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
