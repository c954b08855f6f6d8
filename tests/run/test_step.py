"""What a step leaves out, and says so."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from cat_grpo.run.opening import open_loop
from cat_grpo.settings import load_config
from cat_grpo.run.step import Loop, train_step

SMALL = ["train.problems_per_step=2", "train.steps=1", "rollout.group_size=2"]


async def loop_of(run: Path, *overrides: str) -> Loop:
    return await open_loop(load_config("lab-verifiable", None, [*SMALL, *overrides]), run)


@pytest.mark.parametrize(
    ("cut", "importance"),
    [("rollout.top_p=0.9", "none"), ("rollout.top_k=5", "none"), ("rollout.top_p=1", "token")],
)
async def test_importance_is_off_where_the_engine_sampled_from_less(tmp_path, cut, importance, caplog):
    with caplog.at_level(logging.WARNING):
        loop = await loop_of(tmp_path / "run", "learner.importance=token", cut)
    await loop.close()
    assert loop.learner._config.importance == importance
    assert ("learner.importance is off" in caplog.text) is (importance == "none")


@pytest.mark.parametrize("mean_over", ["sequence", "token", "constant"])
async def test_a_step_without_a_reward_makes_no_update(tmp_path, monkeypatch, mean_over: str):
    loop = await loop_of(tmp_path / "run", f"learner.mean_over={mean_over}")
    await loop.rollouts(0, 0)
    await loop.references(0, 0)
    await loop.scores(0, 0)
    scored = loop.run.read_step(0)
    unjudged = [
        replace(group, scores=tuple(replace(score, reward=None) for score in group.scores))
        for group in scored
    ]
    monkeypatch.setattr(type(loop.run), "read_step", lambda run, step: unjudged)
    before = {name: weight.clone() for name, weight in loop.learner.model.state_dict().items()}
    metrics = await loop.update(0)
    await loop.close()
    assert metrics["policy/rows"] == 0.0
    assert all(weight.equal(before[name]) for name, weight in loop.learner.model.state_dict().items())


async def test_a_step_that_is_refused_changes_no_weight_and_says_so(tmp_path):
    loop = await loop_of(tmp_path / "run", "train.steps=2", "rollout.group_size=8")
    asked = []

    async def refuse_first(step: int) -> bool:
        asked.append((step, len(loop.run.read_step(step)), len(loop.run.metrics())))
        return step > 0

    before = {name: weight.clone() for name, weight in loop.learner.model.state_dict().items()}
    skipped = await train_step(loop, 0, accept=refuse_first)
    assert all(weight.equal(before[name]) for name, weight in loop.learner.model.state_dict().items())
    updated = await train_step(loop, 1, accept=refuse_first)
    await loop.close()
    assert asked == [(0, 2, 0), (1, 2, 1)]  # the step's groups are there, its line of metrics is not
    assert skipped["policy/skipped"] == 1.0 and "policy/skipped" not in updated
    assert skipped["reward/mean"] >= 0.0
    assert loop.run.metrics() == [skipped, loop.run.metrics()[1]]
    assert loop.run.summaries_file(0).exists()


async def test_a_gate_that_lets_all_through_changes_nothing(tmp_path):
    async def accept(step: int) -> bool:
        return True

    lines = []
    for folder, gate in (("without", None), ("with", accept)):
        loop = await loop_of(tmp_path / folder)
        metrics = await train_step(loop, 0, accept=gate)
        await loop.close()
        lines.append({name: metrics[name] for name in metrics if not name.startswith(("time/", "engine/"))})
    assert lines[0] == lines[1]
