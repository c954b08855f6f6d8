"""`cat-grpo serve` for real: a server with its worker, and runs that a user starts, stops and answers."""

import os
import shutil
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import cat_grpo
from cat_grpo.config import Config
from cat_grpo.errors import BadInput
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import preset_names
from cat_grpo.shipped import shipped
from dashboard import PATIENCE_S, Served, num_steps, two_free_ports, until
from flows.deployments import silent_runs_crash
from flows.serve import gpus, serve


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
    folder = Path(cat_grpo.__file__).parent / "presets"
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
        with pytest.raises(BadInput, match=f"port {port} of 127.0.0.1 is not available: Address already"):
            serve(tmp_path, port=port)
        with pytest.raises(BadInput, match=f"port {port} of"):  # the inspector's
            serve(tmp_path, port=port - 1)


def test_nobody_else_is_let_in_without_a_password(tmp_path: Path):
    with pytest.raises(BadInput, match=r"--host 0\.0\.0\.0: whoever reaches the server can run code here"):
        serve(tmp_path, host="0.0.0.0")


def test_what_prefect_yaml_says_is_there(served: Served):
    there = served.deployments()
    plan = yaml.safe_load(shipped("prefect.yaml").read_text())
    assert sorted(there) == sorted(each["name"] for each in plan["deployments"])
    for deployment in plan["deployments"]:
        assert there[deployment["name"]]["parameters"] == deployment["parameters"]
        assert there[deployment["name"]]["description"] == deployment["description"]
    assert served.get("work_pools/cat-grpo")["concurrency_limit"] == max(1, len(gpus()))
    assert sorted(each["enabled"] for each in served.post("automations/filter")) == [False, False, True]


def test_the_one_setting_is_the_database(served: Served, postgres: str | None):
    if postgres is None:
        pytest.skip("there is no PostgreSQL server on this machine")
    assert not list((served.folder / "prefect").glob("prefect.db*"))


def test_a_cancelled_run_ends_and_the_one_that_waited_resumes_it(served: Served):
    folder = served.folder / "runs" / "first"
    first = served.run("runs/first")
    until(lambda: num_steps(folder) >= 2, "two steps")
    [engine] = served.engines()
    processes = [engine, *engine.children(recursive=True)]
    second = served.run("runs/first", num_steps=1)
    served.cancel(first)
    served.wait(first, "Cancelled")
    done = RunDir(folder).metrics()
    assert not [process for process in processes if process.is_running()]
    assert served.get(f"flow_runs/{first}")["run_count"] == 1  # and was not tried again
    assert served.get(f"flow_runs/{second}")["run_count"] == 0  # it waited for the one slot

    served.wait(second, "Completed")
    kept = num_steps(folder) - 1
    assert RunDir(folder).metrics()[:kept] == done[:kept]
    assert kept >= len(done) - 1  # a step that was cancelled in its checkpoint is done again


def test_a_run_that_fails_is_tried_once_more_from_its_last_step_on(served: Served):
    folder = served.folder / "runs" / "failing"
    in_the_way = folder / "steps" / "000001"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    failing = served.run("runs/failing", num_steps=2, retry_delay_s=5)
    served.wait(failing, "AwaitingRetry")
    in_the_way.unlink()
    [done] = RunDir(folder).metrics()
    served.wait(failing, "Completed")
    assert served.get(f"flow_runs/{failing}")["run_count"] == 2
    assert RunDir(folder).metrics()[0] == done
    assert num_steps(folder) == 3  # each try has the whole budget


def test_a_run_that_is_suspended_ends_its_process_and_is_resumed(served: Served):
    folder = served.folder / "runs" / "suspended"
    suspended = served.run("runs/suspended")
    until(lambda: num_steps(folder) >= 1, "a step")
    served.suspend(suspended)
    until(lambda: not served.engines(), "the process ends, and its GPU is free")
    assert served.state(suspended) == "Suspended"
    done = RunDir(folder).metrics()
    served.post(f"flow_runs/{suspended}/resume")
    until(lambda: num_steps(folder) > len(done), "another step")
    assert RunDir(folder).metrics()[: len(done) - 1] == done[:-1]
    served.cancel(suspended)
    served.wait(suspended, "Cancelled")


def test_when_worker_and_run_are_killed_all_ends_and_a_new_start_resumes_it(served: Served):
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
