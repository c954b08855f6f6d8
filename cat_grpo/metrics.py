"""What a step's records say, as slash-named floats. A figure that has nothing to count is left out."""

import math
from collections.abc import Iterable, Sequence
from statistics import correlation
from typing import TYPE_CHECKING

from cat_grpo.records import ScoredGroup

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float]


def step_metrics(scored: Sequence[ScoredGroup], total_rewards: "Tensor") -> Metrics:
    """Figures of one step. `total_rewards` is (P, G): what the advantages are made of, NaN for none."""
    figures = (
        _reference_metrics(scored)
        | _consensus_metrics([group for group in scored if group.group.problem.kind == "verifiable"])
        | _reward_metrics(scored, total_rewards)
        | _rubric_metrics([group for group in scored if group.group.problem.kind == "open"])
        | _length_metrics(scored)
    )
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def agrees_with_majority(group: ScoredGroup) -> bool | None:
    """Whether the reference's answer is the majority's; None where either is missing.

    The rollouts were compared with the reference already: a voter of the majority knows.
    """
    if group.reference.text is None or group.reference.majority is None:
        return None
    voters = (score for score in group.scores if score.answer == group.reference.majority)
    return any(score.reward == 1.0 for score in voters)


def differs_from_all(group: ScoredGroup) -> bool | None:
    """Whether no rollout has the reference's answer; None without a reference."""
    if group.reference.text is None or group.group.problem.kind == "open":
        return None
    return all(score.reward == 0.0 for score in group.scores)


def mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def std(values: Sequence[float]) -> float:
    """Population standard deviation."""
    centre = mean(values)
    return math.sqrt(mean((value - centre) ** 2 for value in values))


def _reference_metrics(scored: Sequence[ScoredGroup]) -> Metrics:
    references = [group.reference for group in scored]
    agrees = [agrees_with_majority(group) for group in scored]
    alone = [differs_from_all(group) for group in scored]
    return {
        "reference/present_frac": mean(reference.text is not None for reference in references),
        "reference/truncated_frac": mean(reference.finish_reason == "length" for reference in references),
        "reference/tokens": mean(reference.num_tokens for reference in references),
        "reference/differs_from_majority_frac": mean(not agree for agree in agrees if agree is not None),
        "reference/differs_from_all_frac": mean(differs for differs in alone if differs is not None),
    }


def _consensus_metrics(scored: Sequence[ScoredGroup]) -> Metrics:
    answers = [[score.answer for score in group.scores] for group in scored]
    return {
        "consensus/majority_frac": mean(group.reference.num_votes / len(group.scores) for group in scored),
        "consensus/distinct_answers": mean(len(set(row) - {None}) for row in answers),
        "consensus/unparsed_frac": mean(answer is None for row in answers for answer in row),
    }


def _reward_metrics(scored: Sequence[ScoredGroup], total_rewards: "Tensor") -> Metrics:
    groups = [[score.reward for score in group.scores if score.reward is not None] for group in scored]
    judged = [rewards for rewards in groups if rewards]
    scores = [score for group in scored for score in group.scores]
    return {
        "reward/mean": mean(reward for rewards in judged for reward in rewards),
        "reward/total_mean": total_rewards.nanmean().item(),
        "reward/std": mean(std(rewards) for rewards in judged),
        "reward/all_zero_frac": mean(set(rewards) == {0.0} for rewards in judged),
        "reward/all_one_frac": mean(set(rewards) == {1.0} for rewards in judged),
        "reward/no_variance_frac": mean(len(set(rewards)) == 1 for rewards in judged),
        "reward/penalised_frac": mean(score.penalty > 0 for score in scores),
        "reward/dropped_frac": mean(score.reward is None for score in scores),
        "reward/dropped_groups": float(len(groups) - len(judged)),
        "reward/length_correlation": _length_correlation(scored),
    }


def _rubric_metrics(scored: Sequence[ScoredGroup]) -> Metrics:
    rubrics = [group.rubric for group in scored]
    verdicts = [v.satisfied for group in scored for score in group.scores for v in score.verdicts]
    columns = [
        {score.verdicts[i].satisfied for score in group.scores} - {None}
        for group in scored
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


def _length_metrics(scored: Sequence[ScoredGroup]) -> Metrics:
    rollouts = [rollout for group in scored for rollout in group.group.rollouts]
    return {
        "policy/tokens_per_rollout": mean(len(rollout.token_ids) for rollout in rollouts),
        "policy/truncated_frac": mean(rollout.finish_reason == "length" for rollout in rollouts),
    }


def _length_correlation(scored: Sequence[ScoredGroup]) -> float:
    """Pearson's, over all rollouts with a reward; NaN where either side is constant."""
    pairs = [
        (float(len(rollout.token_ids)), score.reward)
        for group in scored
        for rollout, score in zip(group.group.rollouts, group.scores, strict=True)
        if score.reward is not None
    ]
    lengths, rewards = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(set(lengths)) < 2 or len(set(rewards)) < 2:
        return math.nan
    return correlation(lengths, rewards)
