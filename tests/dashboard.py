"""`cat-grpo serve` in a folder of its own, for the tests that schedule and watch runs."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from cat_grpo.run.rundir import RunDir

PATIENCE_S = 180
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Served:
    """`cat-grpo serve` in a folder of its own, and its server's API."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.folder, self.database, self.port = folder, database, two_free_ports()
        self.ui = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.ui}/api"
        self.start()

    def start(self) -> None:
        environment = os.environ | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        command = [sys.executable, "-c", "from cat_grpo.cli import main; main()", "serve"]
        command += ["--port", str(self.port), *(["--database", self.database] if self.database else [])]
        with (self.folder / "serve.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: "Ctrl-C stops" in self.said() or self.process.poll() is not None, "serve is up")
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        return (self.folder / "serve.log").read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> list[psutil.Process]:
        """The processes of the runs that are under way."""
        found = []
        for process in self.below():
            with suppress(psutil.NoSuchProcess):  # it ends just now
                found += [process] if "prefect.engine" in process.cmdline() else []
        return found

    def get(self, path: str) -> Any:
        return self._ask("GET", path).json()

    def post(self, path: str, **body: Any) -> Any:
        return self._ask("POST", path, json=body).json()

    def patch(self, path: str, **body: Any) -> None:
        self._ask("PATCH", path, json=body)

    def _ask(self, method: str, path: str, **sent: Any) -> httpx.Response:
        """Again while the database is locked, as Prefect's own client does."""
        answers: list[httpx.Response] = []

        def is_answered() -> bool:
            answers.append(httpx.request(method, f"{self.url}/{path}", timeout=60, **sent))
            return answers[-1].status_code != httpx.codes.SERVICE_UNAVAILABLE

        until(is_answered, f"{path} is answered")
        return answers[-1].raise_for_status()

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.post("deployments/filter")}

    def run(self, run_dir: str, num_steps: int = 1000, retry_delay_s: int = 60, **train: Any) -> str:
        """Starts a small training run, as the form of the dashboard does. Returns its id."""
        deployment = self.deployments()["lab-verifiable"]
        config = small_config(deployment, num_steps, **train)
        made = self.post(
            f"deployments/{deployment['id']}/create_flow_run",
            parameters={"config": config, "run_dir": run_dir},
            job_variables={"env": {"PREFECT_FLOWS_DEFAULT_RETRY_DELAY_SECONDS": str(retry_delay_s)}},
        )
        return made["id"]

    def runs_in(self, run_dir: str) -> list[dict[str, Any]]:
        """All that were ever started or are due there."""
        return [run for run in self.post("flow_runs/filter") if run["parameters"]["run_dir"] == run_dir]

    def state(self, flow_run: str) -> str:
        return self.get(f"flow_runs/{flow_run}")["state"]["name"]

    def wait(self, flow_run: str, name: str) -> None:
        def is_there() -> bool:
            state = self.get(f"flow_runs/{flow_run}")["state"]
            assert state["name"] == name or state["type"] not in ENDED, (state, self.log("worker-0"))
            return state["name"] == name

        until(is_there, name)

    def cancel(self, flow_run: str) -> None:
        self.post(f"flow_runs/{flow_run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})

    def suspend(self, flow_run: str) -> None:
        """As *Pause* in the dashboard does."""
        later = {"pause_reschedule": True}  # a new process resumes it
        state = {"type": "PAUSED", "name": "Suspended", "state_details": later}
        self.post(f"flow_runs/{flow_run}/set_state", state=state)

    def log(self, name: str) -> str:
        return (self.folder / "prefect" / "cat-grpo" / f"{name}.log").read_text()[-5000:]


def small_config(deployment: dict[str, Any], num_steps: int, **train: Any) -> dict[str, Any]:
    """The deployment's, with small steps, `num_steps` of them a run."""
    return deployment["parameters"]["config"] | {
        "train": {"problems_per_step": 4, "shard_size": 4, "checkpoint_every": 1, "steps": 1000} | train,
        "rollout": {"max_tokens": 16, "group_size": 4},
        "budget": {"steps": num_steps},
    }


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def two_free_ports() -> int:
    """The first of two, one after the other; no two processes look in the same place."""
    for port in range(20000 + 10 * os.getpid() % 20000, 65000):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two ports are free")


def num_steps(folder: Path) -> int:
    return len(RunDir(folder).metrics()) if (folder / "config.json").exists() else 0
