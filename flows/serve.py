"""Starts and stops server, worker and inspector together, for `cat-grpo serve`."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from prefect.settings import PREFECT_HOME

from cat_grpo.errors import BadInput, Stopped
from cat_grpo.shipped import shipped
from flows.artifacts import INSPECTED, INSPECTOR_URL
from flows.deployments import POOL, PREFECT, apply

CLI = (sys.executable, "-c", "from cat_grpo.cli import main; main()")
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""Treated as a Ctrl-C. They come when the session or its terminal ends."""
LOOPBACK = ("127.0.0.1", "localhost")
PATIENCE_S = 120.0
"""The server must answer within this time."""
GRACE_S = 30.0
"""Runs must end within this time, which Prefect also gives to a cancelled run."""
BRIEF_S = 5.0
"""Everything else must end within this time."""
HEARTBEAT_S = 30
"""The shortest that Prefect allows for its flows."""


def serve(runs: Path, host: str = "127.0.0.1", port: int = 4200, database: str | None = None) -> None:
    """Runs a server on `port`, an inspector on the next one, and a worker per GPU, until Ctrl-C or SIGTERM.

    `database` is the server's, by default SQLite in PREFECT_HOME. BadInput for a port that is
    taken. When one of them dies, all end: Stopped.
    """
    token = _token(host)
    for wanted in (port, port + 1):
        _refuse_taken(host, wanted)
    address, inspected = f"http://{host}:{port}", f"http://{host}:{port + 1}"
    environment = _environment(address, inspected, runs)
    services = Services(PREFECT_HOME.value() / "cat-grpo")
    previous = [(each, signal.signal(each, signal.default_int_handler)) for each in ENDINGS]
    try:
        _start(services, runs, (host, port), environment, database, token)
        page = f"{inspected}/?token={token}" if token else inspected
        print(_welcome(address, page, services.logs), flush=True)
        services.watch()
    except KeyboardInterrupt:
        print("Stopping. Press Ctrl-C again to stop at once", flush=True)
    finally:
        services.stop()
        for each, handler in previous:
            signal.signal(each, handler)


class Services:
    """Processes that end together, with all the processes that they started."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._below: set[psutil.Process] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a process in a session of its own, so that a Ctrl-C in the terminal reaches only us."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises Stopped when one of them has ended."""
        self._note_below()
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise Stopped(
                    f"the {name} ended with status {process.returncode}: see {self.logs / f'{name}.log'}"
                )

    def watch(self) -> None:
        while True:
            self.check()
            time.sleep(0.5)

    def stop(self) -> None:
        """Stops all of them, the last one first, so that runs can still tell the server how they ended."""
        with suppress(KeyboardInterrupt):
            for process in reversed(self._processes.values()):
                self._note_below()
                _end(process)
        self._note_below()
        for process in (*self._processes.values(), *self._below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._below, timeout=BRIEF_S)

    def _note_below(self) -> None:
        """Records the children now: once the parent is killed they can no longer be found."""
        self._below |= set(psutil.Process().children(recursive=True))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends its children first, because a worker waits for its runs without telling them to end."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    psutil.wait_procs(below, timeout=GRACE_S)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(BRIEF_S)


def gpus() -> list[str]:
    """The GPUs, each as CUDA_VISIBLE_DEVICES names it; empty without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch  # slow: not for --help, and not when the variable is set

    return [str(i) for i in range(torch.cuda.device_count())]


def _start(
    services: Services,
    runs: Path,
    where: tuple[str, int],
    environment: Mapping[str, str],
    database: str | None,
    token: str | None,
) -> None:
    host, port = where
    own = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database} if database else {}
    command = (*PREFECT, "server", "start", "--host", host, "--port", str(port))
    services.start("server", command, {**environment, **own})
    _wait_until_healthy(services, f"http://{host}:{port}/api/health")
    runs.mkdir(parents=True, exist_ok=True)
    # Passed in the environment, because everybody on a machine can read command lines.
    own = {"CAT_GRPO_INSPECTOR_TOKEN": token} if token else {}
    command = (*CLI, "inspect", str(runs), "--host", host, "--port", str(port + 1))
    services.start("inspector", command, {**environment, **own})
    devices = gpus()
    asyncio.run(apply(shipped("prefect.yaml"), max(1, len(devices)), HEARTBEAT_S, environment))
    services.check()
    # One worker per GPU, so that its run sees no other. With one GPU, or none, there is nothing to divide.
    for i, seen in enumerate(devices if len(devices) > 1 else [None]):
        own = {"CUDA_VISIBLE_DEVICES": seen} if seen else {}
        command = (*PREFECT, "worker", "start", "--pool", POOL, "--name", f"worker-{i}", "--limit", "1")
        services.start(f"worker-{i}", command, {**environment, **own})


def _environment(address: str, inspected: str, runs: Path) -> dict[str, str]:
    return os.environ | {
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_UI_API_URL": "/api",  # works by any name or tunnel that the browser uses
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "false",  # a run uses the worker's packages
        INSPECTOR_URL: inspected,
        INSPECTED: str(runs.resolve()),
    }


def _token(host: str) -> str | None:
    """The inspector's token, None when nobody else can reach it. BadInput if others could start runs here."""
    if host in LOOPBACK:
        return None
    if not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise BadInput(
            f"--host {host}: whoever reaches the server can run code here: set"
            " PREFECT_SERVER_API_AUTH_STRING and PREFECT_API_AUTH_STRING to the same user:password"
        )
    return secrets.token_urlsafe(16)


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadInput(f"port {port} of {host} is not available: {error.strerror}") from error


def _wait_until_healthy(services: Services, url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        services.check()
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise Stopped(f"the server did not answer within {PATIENCE_S:.0f} s: see {services.logs / 'server.log'}")


def _welcome(address: str, inspected: str, logs: Path) -> str:
    return f"""\
Dashboard  {address}
Artifacts  {address}/v2/artifacts
Inspector  {inspected}
Logs       {logs}
Ctrl-C stops all of them."""
