"""The plan of a run, worked out by hand."""

import pytest

from cat_grpo.config import Config
from cat_grpo.records import Problem
from cat_grpo.run.plan import StagePlan, plan, plan_markdown
from cat_grpo.settings import load_config


def problems(num_verifiable: int, num_open: int) -> list[Problem]:
    messages = ({"role": "user", "content": "?"},)
    kinds = ["verifiable"] * num_verifiable + ["open"] * num_open
    return [Problem(str(i), messages, kind) for i, kind in enumerate(kinds)]


def config(*overrides: str) -> Config:
    numbers = (
        *("train.problems_per_step=8", "train.steps=50", "rollout.group_size=4", "rollout.max_tokens=100"),
        *("reference.max_tokens=200", "reward.max_criteria=10", "reward.rubric_max_tokens=300"),
    )
    return load_config(overrides=[*numbers, *overrides])


def test_verifiable_problems_need_rollouts_and_references():
    assert plan(config(), problems(20, 0)) == [
        StagePlan("rollouts", 8 * 4, 8 * 4 * 100),
        StagePlan("references", 8, 8 * 200),
        StagePlan("rubrics", 0, 0),
        StagePlan("verdicts", 0, 0),
    ]


def test_open_problems_need_a_rubric_each_and_a_verdict_a_rollout_and_criterion():
    stages = {stage.stage: stage for stage in plan(config(), problems(0, 20))}
    assert stages["rubrics"] == StagePlan("rubrics", 8, 8 * 300)
    assert stages["verdicts"].calls == 8 * 4 * 10
    assert stages["verdicts"].max_new_tokens == 320  # a label is one token


def test_mixed_data_are_planned_at_their_share():
    stages = {stage.stage: stage.calls for stage in plan(config(), problems(15, 5))}
    assert stages == {"rollouts": 32, "references": 8, "rubrics": 2, "verdicts": 2 * 4 * 10}


def test_a_majority_asks_nobody():
    stages = {s.stage: s.calls for s in plan(config("reference.estimator=majority"), problems(20, 0))}
    assert stages["references"] == 0


def test_a_written_verdict_is_planned_with_the_tokens_that_it_may_take():
    stages = {s.stage: s for s in plan(config("reward.verdict=xml"), problems(0, 20))}
    assert stages["verdicts"].max_new_tokens == 320 * 64


@pytest.mark.parametrize(
    "line",
    [
        "160 problems, 50 steps of 8: 2.5 epochs, 32 rollouts per update.",
        "| rollouts | 32 | 3,200 | 1,600 |",
        "| references | 8 | 1,600 | 400 |",
        "| rubrics | 8 | 2,400 | 400 |",
        "| verdicts | 320 | 320 | 16,000 |",
    ],
)
def test_the_table_is_the_plan(line):
    assert line in plan_markdown(config(), problems(0, 160)).splitlines()
