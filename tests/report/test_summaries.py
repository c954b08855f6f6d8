"""A step's groups, one row each: what the row says is what the records say."""

import pyarrow.parquet as pq
import pytest

from cat_grpo.config import Config
from cat_grpo.records import (
    Completion,
    Group,
    Problem,
    Reference,
    RewardedGroup,
    RolloutReward,
    Rubric,
    Verdict,
)
from cat_grpo.report.summaries import summarise, summarise_update
from cat_grpo.run.rundir import RunDir


def rollout(num_tokens: int, finish_reason="stop") -> Completion:
    return Completion("text", tuple(range(num_tokens)), (0.0,) * num_tokens, finish_reason)


def verifiable(values, answers, reference: str | None = "7", majority: str | None = "7") -> RewardedGroup:
    """Answers are equal as text."""
    problem = Problem("p", ({"role": "user", "content": "3 + 4?"},), "verifiable")
    rollouts = (rollout(2), rollout(4, "length"))
    rewards = tuple(
        RolloutReward(value, agrees=None if reference is None else answer == reference, answer=answer)
        for value, answer in zip(values, answers, strict=True)
    )
    told = Reference(
        reference,
        answer=reference,
        num_tokens=3,
        finish_reason="stop",
        problem_id="p",
        estimator="synthesis",
        majority=majority,
        num_votes=1,
    )
    return RewardedGroup(Group(problem, (1,), rollouts), told, None, rewards)


def test_a_verifiable_group_by_hand():
    [summary] = summarise([verifiable((1.0, 0.0), ("7", "8"))], first=40)
    assert (summary.group, summary.prompt, summary.reference) == (40, "3 + 4?", "7")
    assert (summary.agrees_with_majority, summary.differs_from_all, summary.no_variance) == (
        True,
        False,
        False,
    )
    assert (summary.truncated, summary.abstained, summary.mean_tokens) == (1, 0, 3.0)
    assert (summary.mean_reward, summary.reward_std) == (0.5, 0.5)


def test_agreement_is_not_read_off_the_reward():
    """With 0.9 for the answer and 0.1 for its form no reward is 1."""
    [summary] = summarise([verifiable((0.9, 0.1), ("7", "8"))])
    assert (summary.agrees_with_majority, summary.differs_from_all) == (True, False)


def test_a_reference_that_no_rollout_has():
    [summary] = summarise([verifiable((0.0, 0.0), ("8", "9"), majority="8")])
    assert (summary.agrees_with_majority, summary.differs_from_all, summary.no_variance) == (
        False,
        True,
        True,
    )


def test_nothing_is_said_of_what_is_missing():
    [summary] = summarise([verifiable((None, None), (None, None), None, None)])
    assert (summary.agrees_with_majority, summary.differs_from_all) == (None, None)
    assert (summary.mean_reward, summary.reward_std, summary.no_variance) == (None, None, False)


def test_missing_verdicts_are_counted():
    group = verifiable((1.0, 0.5), (None, None))
    problem = Problem("p", group.group.problem.messages, "open")
    verdicts = (Verdict(True, 0.9), Verdict(None, None))
    rewards = tuple(RolloutReward(1.0, verdicts=verdicts) for _ in range(2))
    opened = RewardedGroup(
        Group(problem, (1,), group.group.rollouts), group.reference, Rubric(("a", "b")), rewards
    )
    assert summarise([opened])[0].abstained == 2


@pytest.mark.parametrize("kl", [[], [[0.25, 0.5]]])
def test_an_update_is_written_beside_its_groups(tmp_path, kl):
    run = RunDir.open(tmp_path / "run", Config(), [])
    rewarded = [verifiable((1.0, None), ("7", None))]
    path = run.write_summaries(3, summarise_update(rewarded, kl, [[0.9, None]], [[0.0, None]]))
    [row] = pq.read_table(path).to_pylist()
    assert path == run.summaries_file(3)
    assert row["kl"] == (kl[0] if kl else [])
    assert (row["totals"], row["advantages"]) == ([0.9, None], [0.0, None])
