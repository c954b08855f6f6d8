"""A run that was killed and started again is the run that was not: the same weights, bit for bit.

`python tests/run/test_resume.py RUN [key=value ...]` is the command that the tests start and kill.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cat_grpo.errors import BadInput
from cat_grpo.lab.problems import labelled_rows, unlabelled, write_problems
from cat_grpo.learner.learner import NotFiniteError
from cat_grpo.run.opening import open_loop
from cat_grpo.run.step import Loop
from cat_grpo.run.train import train
from cat_grpo.settings import load_config

STEPS, CHECKPOINT_EVERY, NUM_SHARDS = 7, 2, 2
STAGES = ("rollouts", "references", "rewards")


async def walk(run: Path, overrides: Sequence[str]) -> None:
    await train(load_config("lab-verifiable", overrides=overrides), run)


def loop_of(run: Path, overrides: Sequence[str]) -> AbstractAsyncContextManager[Loop]:
    return open_loop(load_config("lab-verifiable", overrides=overrides), run)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, lab_model: Path) -> list[str]:
    """Seconds of the lab: every setting that has state of its own is on."""
    problems = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_problems(unlabelled(labelled_rows("verifiable", 10, seed=0, held_out=False)), problems)
    return [
        f"model.path={lab_model}",
        "model.device=cpu",
        f"data.path={problems}",
        "rollout.group_size=4",
        "learner.kl_coef=0.01",
        "learner.updates_per_step=2",
        "learner.learning_rate=1e-3",  # so that a step that is lost, or made twice, is seen at once
        f"train.steps={STEPS}",
        "train.problems_per_step=4",
        f"train.shard_size={4 // NUM_SHARDS}",
        f"train.checkpoint_every={CHECKPOINT_EVERY}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    asyncio.run(walk(run, settings))
    return run


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "latest" / "model.safetensors").read_bytes()


def history(run: Path, without: tuple[str, ...] = ("time/", "engine/")) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(without)} for line in lines]


def stage_files(run: Path) -> dict[Path, int]:
    """When each stage's file was written."""
    return {path: path.stat().st_mtime_ns for path in run.glob("steps/*/*-*.parquet")}


def kill_when(condition: Callable[[], bool], command: Sequence[str], log: Path) -> None:
    """Start the command, and kill it as soon as the condition holds."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while not condition():
                assert process.poll() is None, log.read_text()
                time.sleep(0.001)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_killed_and_started_again_it_is_the_same_run(tmp_path, settings, uninterrupted):
    run = tmp_path / "run"
    command = [sys.executable, __file__, str(run), *settings]
    seen: dict[Path, int] = {}

    # In the middle of a step whose forerunner has no checkpoint: steps 2 and 3 are updated again.
    kill_when((run / "steps/000003/rollouts-00.parquet").exists, command, tmp_path / "log")
    assert (run / "checkpoints/latest").resolve().name == "000002"
    seen |= stage_files(run)
    assert {path.parent.name for path in seen} >= {"000000", "000001", "000002", "000003"}

    # While a checkpoint is being written, or soon after.
    kill_when(lambda: any(run.glob("checkpoints/*000004*")), command, tmp_path / "log")
    assert (run / "checkpoints/latest").resolve().name in ("000002", "000004")
    seen |= {path: written for path, written in stage_files(run).items() if path not in seen}

    asyncio.run(walk(run, settings))
    assert weights(run) == weights(uninterrupted)
    assert history(run) == history(uninterrupted)
    files = stage_files(run)
    assert {path: files[path] for path in seen} == seen  # what was there was used again
    assert len(files) == STEPS * NUM_SHARDS * len(STAGES)
    assert not [path for path in run.rglob(".*") if path.name.endswith(".tmp")]


def test_a_run_leaves_a_line_and_whole_stages_a_step(uninterrupted: Path):
    lines = history(uninterrupted)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert any(line["policy/loss"] != 0.0 and line["policy/kl"] != 0.0 for line in lines)
    with_checkpoint = [line["step"] for line in lines if "selection/score" in line]
    assert with_checkpoint == [1, 3, 5, 6]  # after every second step, and after the last
    shards = {f"{stage}-{shard:02d}.parquet" for stage in STAGES for shard in range(NUM_SHARDS)}
    expected = shards | {"groups.parquet"}
    for step in range(STEPS):
        assert {path.name for path in (uninterrupted / f"steps/{step:06d}").iterdir()} == expected


def test_more_steps_may_be_asked_for_later(tmp_path: Path, settings: list[str], uninterrupted: Path):
    asyncio.run(walk(tmp_path, [*settings, "train.steps=3"]))
    assert len(history(tmp_path)) == 3
    assert weights(tmp_path) != weights(uninterrupted)
    asyncio.run(walk(tmp_path, settings))
    assert weights(tmp_path) == weights(uninterrupted)
    # Step 3 was once the last, and so has a checkpoint and a score.
    without = ("time/", "engine/", "selection/")
    assert history(tmp_path, without) == history(uninterrupted, without)


def test_a_finished_run_started_again_does_nothing(settings: list[str], uninterrupted: Path):
    def state() -> dict[Path, int]:
        kept = [*uninterrupted.glob("steps/*/*"), *uninterrupted.glob("checkpoints/latest/*")]
        return {path: path.stat().st_mtime_ns for path in [*kept, uninterrupted / "metrics.jsonl"]}

    before = state()
    asyncio.run(walk(uninterrupted, settings))
    assert state() == before


def test_another_seed_is_another_run(tmp_path: Path, settings: list[str], uninterrupted: Path):
    asyncio.run(walk(tmp_path, [*settings, "train.seed=1", "train.steps=1"]))
    assert history(tmp_path)[0]["policy/grad_norm"] != history(uninterrupted)[0]["policy/grad_norm"]


@pytest.mark.parametrize(
    "override",
    [
        "learner.learning_rate=1e-4",
        "rollout.group_size=8",
        "reference.temperature=1.0",
        "train.seed=1",
        "prompts=default",
    ],
)
async def test_other_settings_are_refused_in_one_line(settings, uninterrupted: Path, override: str):
    key = override.partition("=")[0]
    before = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(BadInput, match=rf"config\.json: {key}: the run was started with") as error:
        await walk(uninterrupted, [*settings, override])
    assert "\n" not in str(error.value)
    assert (uninterrupted / "config.json").read_bytes() == before


async def test_a_stage_reads_the_file_of_the_one_before(tmp_path: Path, settings: list[str]):
    async with loop_of(tmp_path, settings) as loop:
        await loop.rollouts(0, 0)
        group, other = loop.run.read_groups(0, 0)
        changed = replace(group.rollouts[0], text=r"The sums are \boxed{1, 2, 3, 4}.")
        loop.run.write_groups(0, 0, [replace(group, rollouts=(changed, *group.rollouts[1:])), other])
        await loop.rollouts(0, 0)  # is there already
        await loop.references(0, 0)
        await loop.rewards(0, 0)
        assert r"\boxed{1, 2, 3, 4}" in loop.run.read_references(0, 0)[0].prompt
        assert loop.run.read_rewarded(0, 0)[0].rewards[0].answer == "1, 2, 3, 4"


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
async def test_what_is_not_finite_stops_the_run_before_the_step(tmp_path, settings, kl_coef: float):
    async with loop_of(tmp_path, [*settings, f"learner.kl_coef={kl_coef}"]) as loop:
        for shard in range(NUM_SHARDS):
            for stage in (loop.rollouts, loop.references, loop.rewards):
                await stage(0, shard)
        with torch.no_grad():
            loop.learner.model.get_output_embeddings().weight[0, 0] = torch.nan
        with pytest.raises(NotFiniteError, match="step 0: ") as error:
            await loop.update(0)
        (rejected,) = loop.run.step_folder(0).glob("*.pt")
        assert str(rejected) in str(error.value)
        assert len(torch.load(rejected)["rows"]) == 16  # 4 problems of 4 rollouts
        assert loop.run.metrics() == []
        assert loop.next_step == 0


if __name__ == "__main__":
    asyncio.run(walk(Path(sys.argv[1]), sys.argv[2:]))
