"""The flows, run for real in Prefect's test harness: a tiny model, a few steps, what is left behind."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
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

import cat_grpo.run.synthesize
import flows.artifacts
from cat_grpo.config import BudgetConfig, Config, ModelConfig, ServerConfig
from cat_grpo.errors import BadInput
from cat_grpo.method import cat
from cat_grpo.records import Problem
from cat_grpo.report.reviews import REVIEWS, Review, append_review, now
from cat_grpo.run.order import Change, read_changes
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.tables import Row
from cat_grpo.run.train import spent
from cat_grpo.settings import load_config
from flows.artifacts import artifact_key, inspector_link
from flows.demo import make_room
from flows.evaluate import evaluate
from flows.secrets import read_secrets
from flows.synthesize import synthesize
from flows.train import train

Tiny = Callable[..., Config]

PATIENCE_S = 60
STAGES = ("rollouts", "references", "rewards")


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
    """What Prefect's server knows of a flow run: its tasks by name with their states, and its artifacts.

    The server learns of tasks by events, a little late: so it is asked until so many have ended.
    """
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    deadline = time.monotonic() + PATIENCE_S
    async with get_client() as client:
        while True:
            tasks = await client.read_task_runs(flow_run_filter=of_run)
            if len(tasks) >= num_tasks and all(task.state and task.state.is_final() for task in tasks):
                break
            seen = {task.name: task.state_name for task in tasks}
            assert time.monotonic() < deadline, f"{num_tasks} tasks have not ended, but: {seen}"
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

    seen = await run_of(state, num_tasks=9)
    stages = [f"{stage}-{step:06d}" for step in (0, 1) for stage in (*STAGES, "update")]
    assert sorted(seen["tasks"]) == sorted([*stages, "checkpoint-000001"])
    assert set(seen["tasks"].values()) == {"Completed"}

    keys = sorted(artifact.key for artifact in seen["artifacts"])
    once, twice = ("curves", "progress", "report"), ("references", "step")
    assert keys == sorted(f"my-runs-first-{name}" for name in (*once, *twice, *twice))
    assert all(len(json.dumps(artifact.data)) < 50_000 for artifact in seen["artifacts"])
    tables = [json.loads(a.data) for a in seen["artifacts"] if a.type == "table"]
    written = RunDir(folder).read_step(1)
    assert [{"reference": group.reference.text or ""} for group in written] in [
        [{"reference": row["reference"]} for row in table] for table in tables
    ]
    assert len(RunDir(folder).metrics()) == 2
    assert not temporary_files(folder)


async def test_a_large_step_is_as_few_task_runs_and_its_pages_stay_small(tiny: Tiny, tmp_path: Path):
    large = ("train.steps=1", "train.problems_per_step=256", "train.shard_size=8", "rollout.group_size=2")
    state = await train(tiny(*large), str(tmp_path / "run"), return_state=True)
    seen = await run_of(state, num_tasks=5)
    assert sorted(seen["tasks"]) == sorted(f"{stage}-000000" for stage in (*STAGES, "update", "checkpoint"))
    assert len(RunDir(tmp_path / "run").read_step(0)) == 256
    assert all(len(json.dumps(artifact.data)) < 50_000 for artifact in seen["artifacts"])


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

    monkeypatch.setattr(cat, "derive", fail)
    state = await train(tiny(), str(tmp_path / "run"), return_state=True)
    assert state.is_failed()
    assert state.message and state.message.endswith("ArithmeticError: the loss is nan")
    seen = await run_of(state, num_tasks=3)
    assert sorted(seen["tasks"]) == sorted(f"{stage}-000000" for stage in STAGES)
    assert seen["tasks"]["rewards-000000"] == "Failed"
    assert not list((tmp_path / "run").rglob("rewards-*"))
    assert not temporary_files(tmp_path / "run")

    monkeypatch.undo()
    await train(tiny(), str(tmp_path / "run"))
    assert len(RunDir(tmp_path / "run").metrics()) == 2


async def test_a_shard_that_fails_while_another_is_ahead_fails_the_run_at_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stage that one shard has left, and the other never comes to, has ended too."""
    explore, first_is_ahead = cat.explore, asyncio.Event()
    explored: list[object] = []

    async def fail_the_second(*asked: Any) -> Any:
        explored.append(asked)
        if len(explored) == 1:
            return await explore(*asked)
        await first_is_ahead.wait()
        raise ArithmeticError("the second shard")

    async def wait_for_ever(*_: Any) -> None:
        first_is_ahead.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(cat, "explore", fail_the_second)
    monkeypatch.setattr(cat, "derive", wait_for_ever)
    run = train(tiny(), str(tmp_path / "run"), return_state=True)
    state = await asyncio.wait_for(run, PATIENCE_S)
    assert state.is_failed()
    assert state.message and state.message.endswith("ArithmeticError: the second shard")
    seen = await run_of(state, num_tasks=3)
    assert "Completed" not in seen["tasks"].values()


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


def five_sums(folder: Path) -> tuple[list[str], str]:
    """The prompts of one problem more than a step of `tiny` takes, and the setting that names their file."""
    prompts = [f"Add each pair: {n} + 11, 12 + 13, 14 + 15, 16 + 17." for n in range(20, 25)]
    rows = [{"id": str(i), "kind": "verifiable", "prompt": prompt} for i, prompt in enumerate(prompts)]
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts, f"data.path={json.dumps(str(problems))}"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
async def test_synthesize_writes_a_row_per_problem(tiny: Tiny, tmp_path: Path, suffix: str):
    prompts, data = five_sums(tmp_path)
    out = tmp_path / "new" / f"out{suffix}"
    await synthesize(tiny(data), str(out))
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


async def test_the_next_references_begin_before_the_last_are_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fifth_has_begun, rows_of = asyncio.Event(), cat_grpo.run.synthesize._rows

    async def rows_once_the_fifth_has_begun(problems: Sequence[Problem], *rest: Any) -> list[Row]:
        if problems[0].id == "4":
            fifth_has_begun.set()
        await asyncio.wait_for(fifth_has_begun.wait(), timeout=60)
        return await rows_of(problems, *rest)

    monkeypatch.setattr(cat_grpo.run.synthesize, "_rows", rows_once_the_fifth_has_begun)
    prompts, data = five_sums(tmp_path)
    out = await synthesize(tiny(data), str(tmp_path / "out.jsonl"))
    assert [json.loads(line)["prompt"] for line in Path(out).read_text().splitlines()] == prompts


async def test_synthesize_refuses_another_format_before_any_work(tiny: Tiny, tmp_path: Path):
    with pytest.raises(BadInput, match=r"out\.csv: expected a name that ends in"):
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
    with pytest.raises(BadInput, match=r"server\.api_key: prefect:no-such-block: there is no such"):
        await read_secrets(config)


@pytest.mark.parametrize(
    ("budget", "seconds", "elapsed", "limit"),
    [
        ({}, [9.0] * 99, 1e6, None),
        ({"steps": 2}, [9.0], 9.0, None),
        ({"steps": 2}, [9.0, 9.0], 18.0, "2 steps"),
        ({"problems": 12}, [9.0, 9.0], 18.0, None),  # four a step: a third fits
        ({"problems": 11}, [9.0, 9.0], 18.0, "11 problems"),
        ({"problems": 1}, [9.0], 9.0, "1 problems"),  # one step always is
        ({"minutes": 1.0}, [20.0, 10.0], 40.0, None),  # ten to open the models; 40 + 20 is not later than 60
        ({"minutes": 1.0}, [20.0, 10.0], 40.5, "1 minutes"),
    ],
)
def test_a_budget_ends_ahead_of_the_step_that_it_cannot_hold(budget, seconds, elapsed, limit):
    assert spent(BudgetConfig(**budget), seconds, elapsed, num_problems=4) == limit


async def test_starts_with_budgets_make_the_run_that_one_start_makes(tiny: Tiny, tmp_path: Path):
    whole = tiny("train.steps=3")
    await train(whole, str(tmp_path / "whole"))
    for num_done in (1, 2, 3):
        await train(tiny("train.steps=3", "budget.steps=1"), str(tmp_path / "parts"))
        assert (tmp_path / "parts" / "checkpoints" / "latest").resolve().name == f"{num_done:06d}"
    weights = [
        (tmp_path / run / "checkpoints" / "latest" / "model.safetensors").read_bytes()
        for run in ("whole", "parts")
    ]
    assert weights[0] == weights[1]


async def test_each_start_takes_the_problems_that_came(tiny: Tiny, tmp_path: Path):
    folder = tmp_path / "problems"
    folder.mkdir()

    def add(name: str, first: int, num: int) -> None:
        rows = [
            {"id": f"{name}{n}", "kind": "verifiable", "prompt": f"Add each pair: {n} + 1."}
            for n in range(first, first + num)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = tiny(f"data.path={json.dumps(str(folder))}", "train.steps=9", "budget.problems=4")
    taken: list[set[str]] = []
    for name in ("monday", "tuesday"):
        add(name, 10, 4)
        await train(config, str(tmp_path / "run"))
        run = RunDir(tmp_path / "run")
        taken.append({group.group.problem.id for group in run.read_step(len(run.metrics()) - 1)})
    assert taken == [{f"{name}{n}" for n in range(10, 14)} for name in ("monday", "tuesday")]


async def test_what_was_found_wrong_is_left_out(tiny: Tiny, tmp_path: Path):
    folder = tmp_path / "run"
    await train(tiny("train.steps=9", "budget.steps=1"), str(folder))
    [wrong, *_] = RunDir(folder).read_step(0)
    append_review(folder / REVIEWS, Review(now(), "Ada", 0, 0, wrong.group.problem.id, "wrong"))
    await train(tiny("train.steps=9", "budget.steps=1", "data.reviews=own"), str(folder))
    assert read_changes(folder / "changes.jsonl")[1:] == (Change(1, (), (wrong.group.problem.id,)),)


async def test_alarms_are_events(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[tuple[str, dict, dict]] = []
    monkeypatch.setattr(
        flows.artifacts,
        "emit_event",
        lambda event, resource, payload: told.append((event, resource, payload)),
    )
    await train(tiny("reference.max_tokens=1", "train.steps=3"), str(tmp_path / "run"))
    assert {event for event, _, _ in told} == {"cat_grpo.alarm"}
    by_subject = {resource["cat_grpo.alarm.about"]: payload for _, resource, payload in told}
    assert by_subject["stop"] == {
        "step": 1,
        "reason": "100% of the last step's rollouts have no reward",
        "stops": True,
    }
    assert by_subject["reward/dropped_frac"]["stops"] is False


@pytest.mark.parametrize(("inspected", "linked"), [("runs", True), ("elsewhere", False)])
def test_pages_lead_to_the_inspector_where_it_shows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspected: str, linked: bool
):
    monkeypatch.setenv("CAT_GRPO_INSPECTOR_URL", "http://127.0.0.1:4280/")
    monkeypatch.setenv("CAT_GRPO_INSPECTED", str(tmp_path / inspected))
    link = inspector_link(tmp_path / "runs" / "my run", 12)
    assert ("(http://127.0.0.1:4280/run/my%20run/step/12)" in link) is linked
    assert bool(link) is linked
