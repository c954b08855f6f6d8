"""What a step leaves out, and says so; and what an observer is told of it."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.step import Loop, run_step
from cat_grpo.run.train import train
from cat_grpo.settings import load_config

SMALL = ["train.problems_per_step=2", "train.steps=1", "rollout.group_size=2"]


def loop_of(run: Path, *overrides: str) -> AbstractAsyncContextManager[Loop]:
    return open_loop(load_config("lab-verifiable", None, [*SMALL, *overrides]), run)


@pytest.mark.parametrize("cut", ["rollout.top_p=0.9", "rollout.top_k=5"])
async def test_importance_is_off_where_the_engine_sampled_from_less(tmp_path, cut, caplog):
    """With weights by the ratio to the engine's cut distribution, the same step would be another."""
    weights = {}
    for importance in ("token", "none"):
        with caplog.at_level(logging.WARNING):
            settings = [*SMALL, cut, f'learner.importance="{importance}"', "rollout.group_size=8"]
            config = load_config("lab-verifiable", None, settings)
            run = await train(config, tmp_path / importance)
        weights[importance] = (run.checkpoints / "latest" / "model.safetensors").read_bytes()
        assert ("learner.importance is off" in caplog.text) is (importance == "token")
        caplog.clear()
    assert weights["token"] == weights["none"]


async def test_importance_stays_on_where_the_engine_sampled_from_all(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        async with loop_of(tmp_path / "run", "learner.importance=token"):
            assert "learner.importance is off" not in caplog.text


@pytest.mark.parametrize("mean_over", ["sequence", "token", "constant"])
async def test_a_step_without_a_reward_makes_no_update(tmp_path, monkeypatch, mean_over: str):
    async with loop_of(tmp_path / "run", f"learner.mean_over={mean_over}") as loop:
        await loop.rollouts(0, 0)
        await loop.references(0, 0)
        await loop.rewards(0, 0)
        unjudged = [
            replace(group, rewards=tuple(replace(one, reward=None) for one in group.rewards))
            for group in loop.run.read_step(0)
        ]
        monkeypatch.setattr(type(loop.run), "read_step", lambda run, step: unjudged)
        before = {name: weight.clone() for name, weight in loop.learner.model.state_dict().items()}
        metrics = await loop.update(0)
        assert metrics["policy/rows"] == 0.0
        assert all(weight.equal(before[name]) for name, weight in loop.learner.model.state_dict().items())


class Refusing(Observer):
    """Refuses the first step, and keeps what was there when it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    async def accepts(self, run: RunDir, step: int) -> bool:
        self.asked.append((step, len(run.read_step(step)), len(run.metrics())))
        return step > 0


async def test_a_step_that_is_refused_changes_no_weight_and_says_so(tmp_path):
    observer = Refusing()
    async with loop_of(tmp_path / "run", "train.steps=2", "rollout.group_size=8") as loop:
        before = {name: weight.clone() for name, weight in loop.learner.model.state_dict().items()}
        skipped = await run_step(loop, 0, observer)
        assert all(weight.equal(before[name]) for name, weight in loop.learner.model.state_dict().items())
        updated = await run_step(loop, 1, observer)
        assert loop.run.summaries_file(0).exists()
    assert observer.asked == [(0, 2, 0), (1, 2, 0)]  # the step's groups are there, its line is not
    assert skipped["policy/skipped"] == 1.0 and "policy/skipped" not in updated
    assert skipped["reward/mean"] >= 0.0


async def test_a_gate_that_lets_all_through_changes_nothing(tmp_path):
    class Accepting(Observer):
        async def accepts(self, run: RunDir, step: int) -> bool:
            return True

    lines = []
    for folder, observer in (("without", Observer()), ("with", Accepting())):
        async with loop_of(tmp_path / folder) as loop:
            metrics = await run_step(loop, 0, observer)
        lines.append({name: metrics[name] for name in metrics if not name.startswith(("time/", "engine/"))})
    assert lines[0] == lines[1]


class Listening(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, int]] = []
        self.errors: list[BaseException] = []
        self.lengths: list[int] = []

    def started(self, stage: str, step: int) -> None:
        self.heard.append(("started", stage, step))

    def finished(self, stage: str, step: int, error: BaseException | None) -> None:
        self.heard.append(("finished", stage, step))
        self.errors += [error] if error else []

    async def figures(self, run, history, reason) -> None:
        self.lengths.append(len(history))
        assert run.metrics() == list(history)


async def test_an_observer_hears_of_each_stage_once_however_many_shards_walk_it(tmp_path):
    heard = Listening()
    settings = [*SMALL, "train.problems_per_step=4", "train.shard_size=1", "train.steps=2"]
    config = load_config("lab-verifiable", None, [*settings, "train.checkpoint_every=2"])
    await train(config, tmp_path / "run", heard)
    stages = [(stage, step) for step in (0, 1) for stage in ("rollouts", "references", "rewards", "update")]
    stages.append(("checkpoint", 1))
    both = ("started", "finished")
    assert sorted(heard.heard) == sorted((told, *about) for about in stages for told in both)
    for about in stages:
        started, finished = (heard.heard.index((told, *about)) for told in both)
        assert started < finished
    assert heard.lengths == [1, 2]
    assert not heard.errors


async def test_an_observer_hears_of_a_fault_once_and_the_run_has_it_in_full(tmp_path, monkeypatch):
    async def fail(loop: Loop, step: int, shard: int) -> Path:
        raise ZeroDivisionError("ours")

    heard = Listening()
    monkeypatch.setattr(Loop, "references", fail)
    settings = [*SMALL, "train.problems_per_step=4", "train.shard_size=1"]
    with pytest.raises(ZeroDivisionError, match="ours"):
        await train(load_config("lab-verifiable", None, settings), tmp_path / "run", heard)
    ends = [about for about in heard.heard if about[0] == "finished"]
    assert ("finished", "references", 0) in ends and len(ends) == len(set(ends))
    assert "ours" in map(str, heard.errors)
    assert not any(stage == "update" for _, stage, _ in heard.heard)


async def test_a_fault_ends_a_stage_that_another_shard_was_ahead_in(tmp_path, monkeypatch):
    """Else whoever shows the stage would wait for it for ever."""
    ahead = asyncio.Event()

    async def references(loop: Loop, step: int, shard: int) -> None:
        if shard == 1:
            await ahead.wait()
            raise ZeroDivisionError("ours")

    async def rewards(loop: Loop, step: int, shard: int) -> None:
        ahead.set()
        await asyncio.Event().wait()

    heard = Listening()
    monkeypatch.setattr(Loop, "references", references)
    monkeypatch.setattr(Loop, "rewards", rewards)
    config = load_config("lab-verifiable", None, [*SMALL, "train.shard_size=1"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        await train(config, tmp_path / "run", heard)
    begun = [about for told, *about in heard.heard if told == "started"]
    ended = [about for told, *about in heard.heard if told == "finished"]
    assert ["rewards", 0] in begun
    assert sorted(ended) == sorted(begun)
