"""A step's figures, as slash-named floats. A figure that has nothing to count is left out."""

import math
from collections.abc import Iterable, Sequence
from statistics import correlation
from typing import TYPE_CHECKING

from cat_grpo.records import RewardedGroup

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float]

SCORE = "selection/score"
"""The figure of a checkpoint's step that checkpoints are compared by."""
WINDOW = 10
"""Steps over which a figure is averaged: single steps are noisy."""


def step_metrics(rewarded: Sequence[RewardedGroup], total_rewards: "Tensor") -> Metrics:
    """Returns the figures of one step. `total_rewards` (P, G) makes the advantages; NaN stands for none."""
    figures = (
        _reference_metrics(rewarded)
        | _consensus_metrics([group for group in rewarded if group.group.problem.has_final_answer])
        | _reward_metrics(rewarded, total_rewards)
        | _rubric_metrics([group for group in rewarded if not group.group.problem.has_final_answer])
        | _length_metrics(rewarded)
    )
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def agrees_with_majority(group: RewardedGroup) -> bool | None:
    """Whether the reference's answer is the majority's; None where either is missing.

    The rollouts were compared with the reference already: a voter of the majority knows.
    """
    if group.reference.answer is None or group.reference.majority is None:
        return None
    return any(reward.agrees for reward in group.rewards if reward.answer == group.reference.majority)


def differs_from_all(group: RewardedGroup) -> bool | None:
    """Whether no rollout has the reference's answer; None without one."""
    if group.reference.answer is None:
        return None
    return not any(reward.agrees for reward in group.rewards)


def mean(values: Iterable[float]) -> float:
    """Returns the mean, or NaN when there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def std(values: Sequence[float]) -> float:
    """Returns the population standard deviation."""
    centre = mean(values)
    return math.sqrt(mean((value - centre) ** 2 for value in values))


def _reference_metrics(rewarded: Sequence[RewardedGroup]) -> Metrics:
    references = [group.reference for group in rewarded]
    agrees = [agrees_with_majority(group) for group in rewarded]
    alone = [differs_from_all(group) for group in rewarded]
    return {
        "reference/present_frac": mean(reference.text is not None for reference in references),
        "reference/truncated_frac": mean(reference.finish_reason == "length" for reference in references),
        "reference/tokens": mean(reference.num_tokens for reference in references),
        "reference/differs_from_majority_frac": mean(not agree for agree in agrees if agree is not None),
        "reference/differs_from_all_frac": mean(differs for differs in alone if differs is not None),
    }


def _consensus_metrics(rewarded: Sequence[RewardedGroup]) -> Metrics:
    answers = [[reward.answer for reward in group.rewards] for group in rewarded]
    return {
        "consensus/majority_frac": mean(group.reference.num_votes / len(group.rewards) for group in rewarded),
        "consensus/distinct_answers": mean(len(set(row) - {None}) for row in answers),
        "consensus/unparsed_frac": mean(answer is None for row in answers for answer in row),
    }


def _reward_metrics(rewarded: Sequence[RewardedGroup], total_rewards: "Tensor") -> Metrics:
    groups = [[reward.reward for reward in group.rewards if reward.reward is not None] for group in rewarded]
    judged = [rewards for rewards in groups if rewards]
    rollouts = [reward for group in rewarded for reward in group.rewards]
    return {
        "reward/mean": mean(reward for rewards in judged for reward in rewards),
        "reward/total_mean": total_rewards.nanmean().item(),
        "reward/std": mean(std(rewards) for rewards in judged),
        "reward/all_zero_frac": mean(set(rewards) == {0.0} for rewards in judged),
        "reward/all_one_frac": mean(set(rewards) == {1.0} for rewards in judged),
        "reward/no_variance_frac": mean(len(set(rewards)) == 1 for rewards in judged),
        "reward/penalised_frac": mean(reward.penalty > 0 for reward in rollouts),
        "reward/dropped_frac": mean(reward.reward is None for reward in rollouts),
        "reward/dropped_groups": float(len(groups) - len(judged)),
        "reward/length_correlation": _length_correlation(rewarded),
    }


def _rubric_metrics(rewarded: Sequence[RewardedGroup]) -> Metrics:
    rubrics = [group.rubric for group in rewarded]
    verdicts = [v.satisfied for group in rewarded for reward in group.rewards for v in reward.verdicts]
    columns = [
        {reward.verdicts[i].satisfied for reward in group.rewards} - {None}
        for group in rewarded
        if group.rubric is not None
        for i in range(len(group.rubric.criteria))
    ]
    return {
        "rubric/missing_frac": mean(rubric is None for rubric in rubrics),
        "rubric/criteria": mean(len(rubric.criteria) for rubric in rubrics if rubric is not None),
        "rubric/satisfied_frac": mean(verdict for verdict in verdicts if verdict is not None),
        "rubric/abstained_frac": mean(verdict is None for verdict in verdicts),
        "rubric/no_variance_frac": mean(len(column) < 2 for column in columns),
    }


def _length_metrics(rewarded: Sequence[RewardedGroup]) -> Metrics:
    rollouts = [rollout for group in rewarded for rollout in group.group.rollouts]
    return {
        "policy/tokens_per_rollout": mean(len(rollout.token_ids) for rollout in rollouts),
        "policy/truncated_frac": mean(rollout.finish_reason == "length" for rollout in rollouts),
    }


def _length_correlation(rewarded: Sequence[RewardedGroup]) -> float:
    """Returns Pearson's correlation over all rollouts with a reward; NaN where either side is constant."""
    pairs = [
        (float(len(rollout.token_ids)), reward.reward)
        for group in rewarded
        for rollout, reward in zip(group.group.rollouts, group.rewards, strict=True)
        if reward.reward is not None
    ]
    lengths, rewards = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(set(lengths)) < 2 or len(set(rewards)) < 2:
        return math.nan
    return correlation(lengths, rewards)
