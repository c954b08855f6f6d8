"""The flows, run for real in Prefect's test harness: a tiny model, a few steps, what is left behind."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import State
from prefect.testing.utilities import prefect_test_harness

import cat_grpo.step
import flows.artifacts
from cat_grpo.config import Config, ModelConfig, ServerConfig
from cat_grpo.presets import load_config
from cat_grpo.rundir import RunDir
from flows.artifacts import artifact_key
from flows.demo import make_room
from flows.evaluate import evaluate
from flows.secrets import read_secrets
from flows.synthesize import synthesize
from flows.train import train

Tiny = Callable[..., Config]

STAGES = ("rollouts", "references", "scores")


@pytest.fixture(scope="module", autouse=True)
def harness() -> Iterator[None]:
    """A Prefect server of this module's own."""
    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture
def tiny() -> Tiny:
    """A config of two steps of two shards of sums."""
    few = ("train.steps=2", "train.problems_per_step=4", "train.shard_size=2", "rollout.group_size=4")
    return lambda *overrides: load_config("lab-verifiable", overrides=[*few, *overrides])


async def run_of(state: State, num_tasks: int) -> dict[str, Any]:
    """What Prefect's server knows of a flow run: its tasks by name with their states, and its artifacts."""
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id
    async with get_client() as client:
        for _ in range(100):  # the server learns of tasks by events, a little late
            tasks = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            )
            if len(tasks) >= num_tasks and all(task.state and task.state.is_final() for task in tasks):
                break
            await asyncio.sleep(0.1)
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    return {"tasks": {task.name: task.state_name for task in tasks}, "artifacts": artifacts}


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


async def test_a_training_run(tiny: Tiny, tmp_path: Path):
    folder = tmp_path / "my runs" / "First"
    state = await train(tiny(), str(folder), return_state=True)
    assert await state.result() == str(folder / "checkpoints" / "best")

    seen = await run_of(state, num_tasks=15)
    shards = [f"{stage}-{step:06d}-{i:02d}" for step in (0, 1) for i in (0, 1) for stage in STAGES]
    rest = ["update-000000", "update-000001", "checkpoint-000001"]
    assert sorted(seen["tasks"]) == sorted([*shards, *rest])
    assert set(seen["tasks"].values()) == {"Completed"}

    keys = sorted(artifact.key for artifact in seen["artifacts"])
    assert keys == ["my-runs-first-curves"] + 2 * ["my-runs-first-references"] + 2 * ["my-runs-first-step"]
    assert all(len(json.dumps(artifact.data)) < 50_000 for artifact in seen["artifacts"])
    tables = [json.loads(a.data) for a in seen["artifacts"] if a.type == "table"]
    written = RunDir(folder).read_step(1)
    assert [{"reference": group.reference.text or ""} for group in written] in [
        [{"reference": row["reference"]} for row in table] for table in tables
    ]
    assert len(RunDir(folder).metrics()) == 2
    assert not temporary_files(folder)


async def test_a_finished_run_does_nothing(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    await train(tiny("train.steps=1"), str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    state = await train(tiny("train.steps=1"), str(tmp_path / "run"), return_state=True)
    assert await state.result() == str(tmp_path / "run" / "checkpoints" / "best")
    assert "has all its 1 steps" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before


async def test_progress_can_be_read_from_the_log(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    await train(tiny(), str(tmp_path / "run"))
    assert [record.progress for record in caplog.records if hasattr(record, "progress")] == [(1, 2), (2, 2)]


async def test_a_failing_stage_fails_the_run_and_leaves_nothing_half_made(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: object) -> None:
        raise ArithmeticError("the loss is nan")

    monkeypatch.setattr(cat_grpo.step, "score_groups", fail)
    state = await train(tiny(), str(tmp_path / "run"), return_state=True)
    assert state.is_failed()
    assert state.message and state.message.endswith("ArithmeticError: the loss is nan")
    seen = await run_of(state, num_tasks=5)
    assert "Failed" in seen["tasks"].values()
    assert "update-000000" not in seen["tasks"]
    assert not list((tmp_path / "run").rglob("scores-*"))
    assert not temporary_files(tmp_path / "run")

    monkeypatch.undo()
    await train(tiny(), str(tmp_path / "run"))
    assert len(RunDir(tmp_path / "run").metrics()) == 2


async def test_an_alarm_stops_the_run_for_good(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cut_off = tiny("reference.max_tokens=1", "train.steps=3")  # no reference, no reward
    latest = str(tmp_path / "run" / "checkpoints" / "latest")
    for words in ("stops after step 1", "stopped after step 1 and stays so"):
        assert (await train(cut_off, str(tmp_path / "run"))).startswith(str(tmp_path))
        assert words in caplog.text
        assert len(RunDir(tmp_path / "run").metrics()) == 1
        assert Path(latest).resolve().name == "000001"


async def test_a_dashboard_that_is_away_costs_no_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def refuse(*_: object) -> None:
        raise flows.artifacts.httpx.ConnectError("connection refused")

    monkeypatch.setattr(flows.artifacts, "acreate_markdown_artifact", refuse)
    await train(tiny("train.steps=1"), str(tmp_path / "run"))
    assert "could not be published: ConnectError: connection refused" in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
async def test_synthesize_writes_a_row_per_problem(tiny: Tiny, tmp_path: Path, suffix: str):
    problems = tmp_path / "problems.jsonl"
    prompts = [f"Add each pair: {n} + 11, 12 + 13, 14 + 15, 16 + 17." for n in range(20, 25)]
    rows = [{"id": str(i), "kind": "verifiable", "prompt": prompt} for i, prompt in enumerate(prompts)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "new" / f"out{suffix}"
    await synthesize(tiny(f"data.path={json.dumps(str(problems))}"), str(out))
    if suffix == ".parquet":
        made = pq.read_table(out).to_pylist()
    else:
        made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in made] == prompts
    assert list(made[0]) == ["id", "prompt", "reference", "answer", "rollouts", "majority", "agrees"]
    for row in made:
        assert len(row["rollouts"]) == 4
        both = row["answer"] is not None and row["majority"] is not None
        assert row["agrees"] == (row["answer"] == row["majority"] if both else None)
    assert not temporary_files(tmp_path)


async def test_synthesize_refuses_another_format_before_any_work(tiny: Tiny, tmp_path: Path):
    with pytest.raises(ValueError, match=r"out\.csv: expected a name that ends in"):
        await synthesize(tiny(), str(tmp_path / "out.csv"))


async def test_evaluate_measures_a_checkpoint(tiny: Tiny, tmp_path: Path):
    held_out = tmp_path / "heldout.jsonl"
    row = {"id": "0", "kind": "verifiable", "prompt": "Add each pair: 1 + 1.", "answer": "2"}
    held_out.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "1"}) + "\n")
    best = await train(tiny("train.steps=1"), str(tmp_path / "run"))
    state = await evaluate(tiny(), str(held_out), model=best, limit=1, return_state=True)
    figures = await state.result()
    assert figures["num_problems"] == 1.0
    assert 0.0 <= figures["pass@1"] <= 1.0
    [page] = (await run_of(state, num_tasks=0))["artifacts"]
    assert page.key == f"{artifact_key(best)}-evaluation"
    assert "| pass@1 |" in page.data


@pytest.mark.parametrize(("name", "key"), [("runs/Demo_1", "runs-demo-1"), ("/", "run"), ("é", "run")])
def test_a_key_has_only_what_prefect_allows(name: str, key: str):
    assert artifact_key(name) == key


def test_a_demo_of_another_seed_steps_aside_and_comes_back(tmp_path: Path):
    out = tmp_path / "demo"

    def ask_for(seed: int) -> None:
        make_room(out, seed)
        (out / "verifiable").mkdir(parents=True, exist_ok=True)
        (out / "verifiable" / "config.json").write_text(json.dumps({"train": {"seed": seed}}))
        (out / f"made-by-{seed}").touch()

    for seed in (0, 0, 1, 2, 0):
        ask_for(seed)
        assert sorted(path.name for path in out.glob("made-by-*")) == [f"made-by-{seed}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "demo-1", "demo-2"]


async def test_a_key_in_a_block_is_read_for_the_flow_alone(tmp_path: Path):
    await Secret(value="sk-in-a-block").save("judge-key")  # type: ignore[misc]
    server = ServerConfig(urls=("http://x/v1",), api="chat", api_key="prefect:judge-key")
    config = Config(judge=ModelConfig(path="m", engine="openai", server=server))
    assert await read_secrets(config) == {"prefect:judge-key": "sk-in-a-block"}
    assert await read_secrets(Config()) == {}
    assert "sk-in-a-block" not in config.model_dump_json()


async def test_a_block_that_is_not_there_is_one_line():
    server = ServerConfig(urls=("http://x/v1",), api_key="prefect:no-such-block")
    config = Config(judge=ModelConfig(path="m", engine="openai", server=server))
    with pytest.raises(ValueError, match=r"server\.api_key: prefect:no-such-block: there is no such"):
        await read_secrets(config)
