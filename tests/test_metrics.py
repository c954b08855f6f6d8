"""The figures of one step, worked out by hand."""

import math
import warnings

import pytest
import torch

from cat_grpo.metrics import agrees_with_majority, differs_from_all, mean, step_metrics
from cat_grpo.records import (
    Completion,
    Group,
    Kind,
    Problem,
    Reference,
    RewardedGroup,
    RolloutReward,
    Rubric,
    Verdict,
)

YES, NO, ABSTAINED = Verdict(True, 0.9), Verdict(False, 0.1), Verdict(None, None)
NAN = math.nan


def rollout(num_tokens: int, cut: bool = False) -> Completion:
    return Completion("", (0,) * num_tokens, (0.0,) * num_tokens, "length" if cut else "stop")


def rewarded(
    kind: Kind,
    lengths: list[int],
    rewards: list[RolloutReward],
    answer: str | None = None,
    text: str | None = "reference",
    majority: tuple[str | None, int] = (None, 0),
    rubric: Rubric | None = None,
    tokens: int = 10,
    cut: int | None = None,
) -> RewardedGroup:
    rollouts = tuple(rollout(length, i == cut) for i, length in enumerate(lengths))
    group = Group(Problem("p", ({"role": "user", "content": "?"},), kind), (1,), rollouts)
    reference = Reference(
        text,
        answer,
        num_tokens=tokens,
        finish_reason="stop" if text is not None else "length",
        majority=majority[0],
        num_votes=majority[1],
    )
    return RewardedGroup(group, reference, rubric, tuple(rewards))


def answered(*answers: str | None, right: str | None) -> list[RolloutReward]:
    """Verifiable rewards: 1 for the reference's answer, else 0; None where there is no reference."""
    agrees = [None if right is None else answer == right for answer in answers]
    return [
        RolloutReward(None if agree is None else float(agree), agrees=agree, answer=answer)
        for agree, answer in zip(agrees, answers, strict=True)
    ]


def judged(reward: float | None, *verdicts: Verdict, penalty: float = 0.0) -> RolloutReward:
    return RolloutReward(reward, penalty, verdicts=verdicts)


SOME_RIGHT = rewarded(
    "verifiable", [2, 2, 4, 8], answered("1", "1", "2", None, right="1"), "1", majority=("1", 2), cut=3
)
ALL_WRONG = rewarded(
    "verifiable", [3, 3, 3, 3], answered("3", "4", "4", "5", right="9"), "9", majority=("4", 2), tokens=20
)
OPEN = rewarded(
    "open",
    [5, 6, 7, 8],
    [
        judged(1.0, YES, YES, penalty=1.0),
        judged(0.5, YES, NO),
        judged(1.0, YES, ABSTAINED),
        judged(None, ABSTAINED, ABSTAINED),
    ],
    rubric=Rubric(("a", "b")),
    tokens=30,
)
DROPPED = rewarded(
    "verifiable",
    [1, 1, 1, 1],
    answered("7", None, None, None, right=None),
    text=None,
    majority=("7", 1),
    tokens=64,
)
STEP = [SOME_RIGHT, ALL_WRONG, OPEN, DROPPED]
TOTALS = torch.tensor([[1, 1, 0, -0.5], [0, 0, 0, 0], [0, 0.5, 1, NAN], [NAN] * 4], dtype=torch.float64)

BY_HAND = {
    "reference/present_frac": 3 / 4,
    "reference/truncated_frac": 1 / 4,
    "reference/tokens": (10 + 20 + 30 + 64) / 4,
    "reference/differs_from_majority_frac": 1 / 2,  # of the two that have both
    "reference/differs_from_all_frac": 1 / 2,  # of the two verifiable ones with a reference
    "consensus/majority_frac": (2 / 4 + 2 / 4 + 1 / 4) / 3,
    "consensus/distinct_answers": (2 + 3 + 1) / 3,
    "consensus/unparsed_frac": (1 + 0 + 3) / 12,
    "reward/mean": (2 + 0 + 2.5) / 11,
    "reward/total_mean": (1.5 + 0 + 1.5) / 11,
    "reward/std": (0.5 + 0 + math.sqrt(1 / 18)) / 3,  # 1, 1/2, 1: mean 5/6, squares 1/36, 4/36, 1/36
    "reward/all_zero_frac": 1 / 3,
    "reward/all_one_frac": 0.0,
    "reward/no_variance_frac": 1 / 3,
    "reward/penalised_frac": 1 / 16,
    "reward/dropped_frac": 5 / 16,
    "reward/dropped_groups": 1.0,
    "rubric/missing_frac": 0.0,
    "rubric/criteria": 2.0,
    "rubric/satisfied_frac": 4 / 5,
    "rubric/abstained_frac": 3 / 8,
    "rubric/no_variance_frac": 1 / 2,  # an abstention is no other opinion
    "policy/tokens_per_rollout": (16 + 12 + 26 + 4) / 16,
    "policy/truncated_frac": 1 / 16,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_figure_by_hand(name):
    assert step_metrics(STEP, TOTALS)[name] == pytest.approx(BY_HAND[name])


def test_no_figure_is_without_its_hand_work():
    assert set(step_metrics(STEP, TOTALS)) - {"reward/length_correlation"} == set(BY_HAND)


def test_no_figure_is_nan():
    assert not any(math.isnan(value) for value in step_metrics(STEP, TOTALS).values())
    nothing_judged = step_metrics([DROPPED], TOTALS[3:])
    assert not any(math.isnan(value) for value in nothing_judged.values())
    assert "reward/mean" not in nothing_judged
    assert "reward/total_mean" not in nothing_judged
    assert nothing_judged["reward/dropped_frac"] == 1.0
    assert nothing_judged["reward/dropped_groups"] == 1.0


def test_figures_of_a_kind_that_is_not_there_are_left_out():
    assert not [name for name in step_metrics([SOME_RIGHT], TOTALS[:1]) if name.startswith("rubric/")]
    only_open = step_metrics([OPEN], TOTALS[2:3])
    assert not [name for name in only_open if name.startswith("consensus/")]
    assert "reference/differs_from_majority_frac" not in only_open
    assert "reference/differs_from_all_frac" not in only_open


def test_a_missing_rubric_is_counted():
    unread = [RolloutReward(None)] * 4
    figures = step_metrics([OPEN, rewarded("open", [1, 1, 1, 1], unread)], TOTALS[2:])
    assert figures["rubric/missing_frac"] == 1 / 2
    assert figures["rubric/criteria"] == 2.0
    assert figures["rubric/no_variance_frac"] == 1 / 2


@pytest.mark.parametrize(
    ("lengths", "rewards", "correlation"),
    [
        ([1, 2, 3], [0.0, 0.5, 1.0], 1.0),
        ([1, 2, 3], [1.0, 0.5, 0.0], -1.0),
        ([1, 2, 3, 99], [0.0, 0.5, 1.0, None], 1.0),  # what was not judged does not count
        (
            [1, 3, 5, 7],
            [0.0, 1.0, 0.0, 1.0],
            1 / math.sqrt(5),
        ),  # 2 / (sqrt(20) * 1)
        ([2, 2, 2], [0.0, 0.5, 1.0], None),
        ([1, 2, 3], [0.5, 0.5, 0.5], None),
        ([1], [0.5], None),
    ],
)
def test_the_correlation_of_reward_with_length(lengths, rewards, correlation):
    earned = [RolloutReward(reward) for reward in rewards]
    totals = torch.tensor([[NAN if reward is None else reward for reward in rewards]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = step_metrics([rewarded("verifiable", lengths, earned)], totals)
    expected = None if correlation is None else pytest.approx(correlation)
    assert figures.get("reward/length_correlation") == expected


def test_groups_of_all_ones_are_counted():
    figures = step_metrics(
        [rewarded("verifiable", [1, 1], answered("1", "1", right="1"), "1"), ALL_WRONG],
        torch.zeros(2, 2),
    )
    assert figures["reward/all_one_frac"] == figures["reward/all_zero_frac"] == 1 / 2
    assert figures["reward/no_variance_frac"] == 1.0


def test_whether_a_reference_agrees_with_the_majority():
    assert agrees_with_majority(SOME_RIGHT) is True
    assert agrees_with_majority(ALL_WRONG) is False
    minority = rewarded("verifiable", [1] * 3, answered("1", "1", "2", right="2"), "2", majority=("1", 2))
    assert agrees_with_majority(minority) is False
    assert agrees_with_majority(OPEN) is None
    assert agrees_with_majority(DROPPED) is None
    nothing_parsed = rewarded("verifiable", [1] * 2, answered(None, None, right="1"), "1")
    assert agrees_with_majority(nothing_parsed) is None


def test_whether_a_reference_differs_from_all():
    assert differs_from_all(SOME_RIGHT) is False
    assert differs_from_all(ALL_WRONG) is True
    assert differs_from_all(OPEN) is None
    assert differs_from_all(DROPPED) is None


def weighted(*answers: str, right: str, majority: tuple[str, int]) -> RewardedGroup:
    """The reward is nine parts agreement and one part of a format that all but the first rollout have."""
    rewards = [
        RolloutReward(
            0.9 * (answer == right) + 0.1 * (i > 0),
            parts={"agreement": float(answer == right), "my:format": float(i > 0)},
            agrees=answer == right,
            answer=answer,
        )
        for i, answer in enumerate(answers)
    ]
    return rewarded("verifiable", [1] * len(answers), rewards, right, majority=majority)


def test_agreement_is_seen_whatever_else_is_rewarded():
    """A right answer earns 0.9 or 1 here, and a wrong one 0 or 0.1."""
    alike = weighted("1", "2", "3", right="1", majority=("1", 1))
    assert [reward.reward for reward in alike.rewards] == [0.9, 0.1, 0.1]
    assert agrees_with_majority(alike) is True
    assert differs_from_all(alike) is False
    minority = weighted("1", "1", "2", right="2", majority=("1", 2))
    assert agrees_with_majority(minority) is False
    assert differs_from_all(minority) is False
    alone = weighted("1", "1", "2", right="9", majority=("1", 2))
    assert agrees_with_majority(alone) is False
    assert differs_from_all(alone) is True
    figures = step_metrics([alike, minority, alone], torch.zeros(3, 3))
    assert figures["reference/differs_from_majority_frac"] == 2 / 3
    assert figures["reference/differs_from_all_frac"] == 1 / 3


def test_agreement_is_seen_where_it_is_not_rewarded():
    """A full reward for something else is no agreement, and no reward at all is no disagreement."""
    full = [RolloutReward(1.0, agrees=False, answer="1"), RolloutReward(1.0, agrees=False, answer="1")]
    elsewhere = rewarded("verifiable", [1, 1], full, "2", majority=("1", 2))
    assert (agrees_with_majority(elsewhere), differs_from_all(elsewhere)) == (False, True)
    unjudged = [RolloutReward(None, agrees=True, answer="1"), RolloutReward(None, agrees=False, answer="2")]
    dropped = rewarded("verifiable", [1, 1], unjudged, "1", majority=("1", 1))
    assert (agrees_with_majority(dropped), differs_from_all(dropped)) == (True, False)


def test_the_mean_of_nothing_is_nan():
    assert math.isnan(mean([]))
    assert mean([True, False]) == 0.5
