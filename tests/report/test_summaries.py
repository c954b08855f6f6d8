"""A step's groups, one row each: what the row says is what the records say."""

import pyarrow.parquet as pq
import pytest

from cat_grpo.config import Config
from cat_grpo.records import (
    Completion,
    Group,
    Problem,
    Reference,
    RolloutScore,
    Rubric,
    ScoredGroup,
    Verdict,
)
from cat_grpo.run.rundir import RunDir
from cat_grpo.report.summaries import summarise, summarise_update


def rollout(num_tokens: int, finish_reason="stop") -> Completion:
    return Completion("text", tuple(range(num_tokens)), (0.0,) * num_tokens, finish_reason)


def verifiable(rewards, answers, reference: str | None = "7", majority: str | None = "7") -> ScoredGroup:
    problem = Problem("p", ({"role": "user", "content": "3 + 4?"},), "verifiable")
    rollouts = (rollout(2), rollout(4, "length"))
    scores = tuple(
        RolloutScore(reward, 0.0, answer, ()) for reward, answer in zip(rewards, answers, strict=True)
    )
    told = Reference("p", reference, "synthesis", "", 3, "stop", majority, 1)
    return ScoredGroup(Group(problem, (1,), rollouts), told, None, scores)


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
    scores = tuple(RolloutScore(1.0, 0.0, None, verdicts) for _ in range(2))
    opened = ScoredGroup(
        Group(problem, (1,), group.group.rollouts), group.reference, Rubric(("a", "b")), scores
    )
    assert summarise([opened])[0].abstained == 2


@pytest.mark.parametrize("kl", [[], [[0.25, 0.5]]])
def test_an_update_is_written_beside_its_groups(tmp_path, kl):
    run = RunDir.open(tmp_path / "run", Config(), [])
    scored = [verifiable((1.0, None), ("7", None))]
    path = run.write_summaries(3, summarise_update(scored, kl, [[0.9, None]], [[0.0, None]]))
    [row] = pq.read_table(path).to_pylist()
    assert path == run.summaries_file(3)
    assert row["kl"] == (kl[0] if kl else [])
    assert (row["totals"], row["advantages"]) == ([0.9, None], [0.0, None])
