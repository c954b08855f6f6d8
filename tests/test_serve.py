"""`cat-grpo serve` for real: a server with its worker, and runs that a user starts, stops and answers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cat_grpo import presets
from cat_grpo.config import Config
from cat_grpo.presets import preset_names
from cat_grpo.rundir import RunDir
from cat_grpo.shipped import shipped
from flows.deployments import silent_runs_crash
from flows.serve import gpus, serve

PATIENCE_S = 180
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
START = """
import sys
from pathlib import Path
from flows.serve import serve
inspector = [sys.executable, "-m", "http.server", sys.argv[2], "--bind", "127.0.0.1"]
try:
    serve(Path("runs"), port=int(sys.argv[1]), database=sys.argv[3] or None, inspector=inspector)
except ChildProcessError as error:
    sys.exit(f"stopped: {error}")
"""


class Served:
    """`cat-grpo serve` in a folder of its own, and its server's API."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.folder, self.database, self.port = folder, database, two_free_ports()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.start()

    def start(self) -> None:
        environment = os.environ | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        command = [sys.executable, "-c", START, str(self.port), str(self.port + 1), self.database or ""]
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

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/{path}").raise_for_status().json()

    def post(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.url}/{path}", json=body).raise_for_status().json()

    def patch(self, path: str, **body: Any) -> None:
        httpx.patch(f"{self.url}/{path}", json=body).raise_for_status()

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.post("deployments/filter")}

    def run(self, run_dir: str, num_steps: int = 1000, **train: Any) -> str:
        """Starts a small training run, as the form of the dashboard does. Returns its id."""
        deployment = self.deployments()["lab-verifiable"]
        config = deployment["parameters"]["config"] | {
            "train": {"problems_per_step": 4, "shard_size": 4, "checkpoint_every": 1, "steps": 1000} | train,
            "rollout": {"max_tokens": 16, "group_size": 4},
            "budget": {"steps": num_steps},
        }
        made = self.post(
            f"deployments/{deployment['id']}/create_flow_run",
            parameters={"config": config, "run_dir": run_dir},
        )
        return made["id"]

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

    def form(self, flow_run: str) -> dict[str, Any]:
        """What the dashboard shows for a run that is paused."""
        keys = self.get(f"flow_runs/{flow_run}")["state"]["state_details"]["run_input_keyset"]
        schema = self.get(f"flow_runs/{flow_run}/input/{keys['schema']}")
        return schema | {"description": self.get(f"flow_runs/{flow_run}/input/{keys['description']}")}

    def answer(self, flow_run: str, **run_input: Any) -> None:
        assert self.post(f"flow_runs/{flow_run}/resume", run_input=run_input)["status"] == "ACCEPT"

    def log(self, name: str) -> str:
        return (self.folder / "prefect" / "cat-grpo" / f"{name}.log").read_text()[-5000:]


def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def two_free_ports() -> int:
    """The first of two, one after the other."""
    for port in range(20000 + os.getpid() % 20000, 65000):
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


@pytest.fixture(scope="module")
def postgres() -> Iterator[str | None]:
    """The address of a database of Debian's PostgreSQL server; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        yield None
        return
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="cat-grpo-postgres-")), two_free_ports()
    if user:
        shutil.chown(folder, "postgres")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    control = [str(found[-1] / "pg_ctl"), "--pgdata", str(folder / "data"), "--silent", "--wait"]
    initial = ["init", "--options", "--username=cat --auth=trust --no-sync"]
    try:
        for command in (initial, ["start", "--log", str(folder / "log"), "--options", options]):
            subprocess.run([*control, *command], cwd=folder, check=True, capture_output=True, **user)
        yield f"postgresql+asyncpg://cat@127.0.0.1:{port}/postgres"
        subprocess.run([*control, "stop", "--mode", "immediate"], cwd=folder, check=True, **user)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, postgres: str | None) -> Iterator[Served]:
    """On PostgreSQL where there is one: SQLite is what all other tests of the flows are on."""
    serving = Served(tmp_path_factory.mktemp("serve"), postgres)
    below = serving.below()
    yield serving
    if serving.process.poll() is None:
        serving.stop()
    assert not [process for process in below if process.is_running()]


def test_every_preset_is_a_deployment_with_just_its_own_values():
    plan = yaml.safe_load(shipped("prefect.yaml").read_text())
    folder = Path(presets.__file__).parent
    trained = {each["name"]: each for each in plan["deployments"] if "train" in each["tags"]}
    assert sorted(trained) == preset_names()
    for name, deployment in trained.items():
        preset = tomllib.loads((folder / f"{name}.toml").read_text())
        assert deployment["parameters"]["config"] == preset
        assert deployment["parameters"]["run_dir"] == f"runs/{name}"


def test_schedules_are_paused_examples_that_would_run():
    plan = yaml.safe_load(shipped("prefect.yaml").read_text())
    schedules = [(each, schedule) for each in plan["deployments"] for schedule in each.get("schedules", [])]
    assert len(schedules) == 2
    for deployment, schedule in schedules:
        assert not schedule["active"]
        Config.model_validate((deployment["parameters"] | schedule["parameters"])["config"])


@pytest.mark.parametrize(
    ("visible", "seen"), [("", []), ("-1", []), ("3", ["3"]), ("0, GPU-1f", ["0", "GPU-1f"])]
)
def test_a_gpu_is_what_the_variable_names(visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == seen


def test_a_port_that_is_taken_is_one_line(tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is not to be had: Address already"):
            serve(tmp_path, port=port)
        with pytest.raises(ValueError, match=f"port {port} of"):  # the inspector's
            serve(tmp_path, port=port - 1)


def test_nobody_else_is_let_in_without_a_password(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0: who reaches the server runs code here"):
        serve(tmp_path, host="0.0.0.0")


def test_what_prefect_yaml_says_is_there(served: Served):
    there = served.deployments()
    plan = yaml.safe_load(shipped("prefect.yaml").read_text())
    assert sorted(there) == sorted(each["name"] for each in plan["deployments"])
    for deployment in plan["deployments"]:
        assert there[deployment["name"]]["parameters"] == deployment["parameters"]
        assert there[deployment["name"]]["description"] == deployment["description"]
    assert served.get("work_pools/cat-grpo")["concurrency_limit"] == max(1, len(gpus()))
    assert sorted(each["enabled"] for each in served.post("automations/filter")) == [False, True]


def test_the_one_setting_is_the_database(served: Served, postgres: str | None):
    if postgres is None:
        pytest.skip("there is no PostgreSQL server on this machine")
    assert not list((served.folder / "prefect").glob("prefect.db*"))


def test_a_cancelled_run_ends_and_the_one_that_waited_goes_on_when_people_let_it(served: Served):
    folder = served.folder / "runs" / "first"
    first = served.run("runs/first")
    until(lambda: num_steps(folder) >= 2, "two steps")
    [engine] = [each for each in served.below() if "prefect.engine" in each.cmdline()]
    processes = [engine, *engine.children(recursive=True)]
    second = served.run("runs/first", num_steps=2, review_gate=True)
    served.cancel(first)
    served.wait(first, "Cancelled")
    done = RunDir(folder).metrics()
    assert not [process for process in processes if process.is_running()]
    assert served.get(f"flow_runs/{second}")["run_count"] == 0  # it waited for the one slot

    served.wait(second, "Paused")
    asked = num_steps(folder)
    assert RunDir(folder).metrics() == done[:asked]
    assert asked >= len(done) - 1  # a step that was cancelled in its checkpoint is done again
    form = served.form(second)
    assert f"Step {asked + 1}: 4 of 4 references" in form["description"]
    assert form["properties"]["accept"]["enum"] == ["update", "skip this step"]
    served.answer(second, accept="skip this step", note="all wrong")
    until(lambda: num_steps(folder) > asked, "the step is done")
    served.wait(second, "Paused")
    served.answer(second, accept="update")
    served.wait(second, "Completed")
    skipped, updated = RunDir(folder).metrics()[asked:]
    assert skipped["policy/skipped"] == 1.0 and "policy/skipped" not in updated
    assert [RunDir(folder).read_decision(asked + i) for i in range(3)] == [False, True, None]


def test_when_worker_and_run_are_killed_all_ends_and_a_new_start_goes_on(served: Served):
    served.post("automations/", **silent_runs_crash(4).model_dump(mode="json"))  # and not after 90 s
    before = served.deployments()
    [weekly] = before["held-out"]["schedules"]
    served.patch(f"deployments/{before['held-out']['id']}/schedules/{weekly['id']}", active=True)
    served.patch(f"deployments/{before['math500']['id']}", paused=True)
    folder = served.folder / "runs" / "second"
    killed = served.run("runs/second")
    until(lambda: num_steps(folder) >= 2, "two steps")
    following = served.run("runs/second", num_steps=1)
    below = served.below()
    for process in below:
        if {"worker", "prefect.engine"} & set(process.cmdline()):
            process.kill()
    assert served.process.wait(PATIENCE_S) == 1
    assert "stopped: the worker-0 ended with status -9: see " in served.said().splitlines()[-1]
    assert not [process for process in below if process.is_running()]
    done = RunDir(folder).metrics()

    served.start()
    served.wait(killed, "Crashed")
    served.wait(following, "Completed")
    assert RunDir(folder).metrics()[: len(done) - 1] == done[:-1]
    assert num_steps(folder) >= len(done)
    check_that_only_what_a_user_set_has_changed(before, served.deployments())
    below = served.below()
    served.stop()
    assert served.process.returncode == 0
    assert not [process for process in below if process.is_running()]


def check_that_only_what_a_user_set_has_changed(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert {name for name, each in after.items() if each["paused"]} == {"math500"}
    active = {name for name, each in after.items() if any(one["active"] for one in each["schedules"])}
    assert active == {"held-out"}
    for name, deployment in after.items():
        for same in ("id", "parameters", "tags", "description", "entrypoint", "job_variables"):
            assert deployment[same] == before[name][same]
        schedules = [
            {one["id"]: one["schedule"] for one in each[name]["schedules"]} for each in (before, after)
        ]
        assert schedules[0] == schedules[1]
