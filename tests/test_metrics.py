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
    RolloutScore,
    Rubric,
    ScoredGroup,
    Verdict,
)

YES, NO, ABSTAINED = Verdict(True, 0.9), Verdict(False, 0.1), Verdict(None, None)
NAN = math.nan


def rollout(num_tokens: int, cut: bool = False) -> Completion:
    return Completion("", (0,) * num_tokens, (0.0,) * num_tokens, "length" if cut else "stop")


def scored(
    kind: Kind,
    lengths: list[int],
    scores: list[RolloutScore],
    text: str | None = "reference",
    majority: tuple[str | None, int] = (None, 0),
    rubric: Rubric | None = None,
    tokens: int = 10,
    cut: int | None = None,
) -> ScoredGroup:
    rollouts = tuple(rollout(length, i == cut) for i, length in enumerate(lengths))
    group = Group(Problem("p", ({"role": "user", "content": "?"},), kind), (1,), rollouts)
    finish_reason = "stop" if text is not None else "length"
    reference = Reference("p", text, "synthesis", "", tokens, finish_reason, *majority)
    return ScoredGroup(group, reference, rubric, tuple(scores))


def answered(*answers: str | None, right: str | None, judged: bool = True) -> list[RolloutScore]:
    """Verifiable scores: 1 for the right answer, else 0; None when nothing was judged."""
    return [RolloutScore(float(a == right) if judged else None, 0.0, a, ()) for a in answers]


SOME_RIGHT = scored(
    "verifiable", [2, 2, 4, 8], answered("1", "1", "2", None, right="1"), majority=("1", 2), cut=3
)
ALL_WRONG = scored(
    "verifiable", [3, 3, 3, 3], answered("3", "4", "4", "5", right="9"), majority=("4", 2), tokens=20
)
OPEN = scored(
    "open",
    [5, 6, 7, 8],
    [
        RolloutScore(1.0, 1.0, None, (YES, YES)),
        RolloutScore(0.5, 0.0, None, (YES, NO)),
        RolloutScore(1.0, 0.0, None, (YES, ABSTAINED)),
        RolloutScore(None, 0.0, None, (ABSTAINED, ABSTAINED)),
    ],
    rubric=Rubric(("a", "b")),
    tokens=30,
)
DROPPED = scored(
    "verifiable",
    [1, 1, 1, 1],
    answered("7", None, None, None, right=None, judged=False),
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
    unread = [RolloutScore(None, 0.0, None, ())] * 4
    figures = step_metrics([OPEN, scored("open", [1, 1, 1, 1], unread)], TOTALS[2:])
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
    scores = [RolloutScore(reward, 0.0, None, ()) for reward in rewards]
    totals = torch.tensor([[NAN if reward is None else reward for reward in rewards]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = step_metrics([scored("verifiable", lengths, scores)], totals)
    expected = None if correlation is None else pytest.approx(correlation)
    assert figures.get("reward/length_correlation") == expected


def test_groups_of_all_ones_are_counted():
    figures = step_metrics(
        [scored("verifiable", [1, 1], answered("1", "1", right="1")), ALL_WRONG],
        torch.zeros(2, 2),
    )
    assert figures["reward/all_one_frac"] == figures["reward/all_zero_frac"] == 1 / 2
    assert figures["reward/no_variance_frac"] == 1.0


def test_whether_a_reference_agrees_with_the_majority():
    assert agrees_with_majority(SOME_RIGHT) is True
    assert agrees_with_majority(ALL_WRONG) is False
    minority = scored("verifiable", [1] * 3, answered("1", "1", "2", right="2"), majority=("1", 2))
    assert agrees_with_majority(minority) is False
    assert agrees_with_majority(OPEN) is None
    assert agrees_with_majority(DROPPED) is None
    nothing_parsed = scored("verifiable", [1] * 2, answered(None, None, right="1"))
    assert agrees_with_majority(nothing_parsed) is None


def test_whether_a_reference_differs_from_all():
    assert differs_from_all(SOME_RIGHT) is False
    assert differs_from_all(ALL_WRONG) is True
    assert differs_from_all(OPEN) is None
    assert differs_from_all(DROPPED) is None


def test_the_mean_of_nothing_is_nan():
    assert math.isnan(mean([]))
    assert mean([True, False]) == 0.5
