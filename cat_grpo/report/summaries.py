"""One row per group of a step, so that a person can search, filter and sort groups without their rollouts.

Group i of a step is in shard i // shard_size, at place i % shard_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from cat_grpo.metrics import agrees_with_majority, differs_from_all, mean, std
from cat_grpo.records import Kind, RewardedGroup

Values = Sequence[Sequence[float | None]]
"""(P, G): one value per rollout, None where it could not be judged."""

SUMMARIES = pa.schema(
    [
        ("group", pa.int32()),
        ("problem_id", pa.string()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("majority", pa.string()),
        ("num_votes", pa.int32()),
        ("agrees_with_majority", pa.bool_()),
        ("differs_from_all", pa.bool_()),
        ("no_variance", pa.bool_()),
        ("truncated", pa.int32()),
        ("abstained", pa.int32()),
        ("mean_reward", pa.float64()),
        ("reward_std", pa.float64()),
        ("mean_tokens", pa.float64()),
        ("kl", pa.list_(pa.float64())),
        ("totals", pa.list_(pa.float64())),
        ("advantages", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One group of a step."""

    group: int
    """Its position in the step, from 0."""
    problem_id: str
    kind: Kind
    prompt: str
    """Its last turn, in full."""
    reference: str | None
    majority: str | None
    num_votes: int
    agrees_with_majority: bool | None
    """None where the reference or a majority is missing."""
    differs_from_all: bool | None
    """No rollout has the reference's answer; None without one."""
    no_variance: bool
    """All rewards are equal, so the group carries no signal. False without a reward."""
    truncated: int
    """The number of rollouts that were cut off."""
    abstained: int
    """The number of verdicts that are missing."""
    mean_reward: float | None
    reward_std: float | None
    mean_tokens: float
    kl: tuple[float, ...] = ()
    """Each rollout's KL to the anchor; empty when no reward includes it."""
    totals: tuple[float | None, ...] = ()
    """reward - penalty - kl_coef * KL, from which the advantages are made. Empty before the update."""
    advantages: tuple[float | None, ...] = ()
    """Empty before the update."""


def summarise(rewarded: Sequence[RewardedGroup], first: int = 0) -> list[Summary]:
    """One per group, in order; `first` is the position of the first of them in its step."""
    return [_summary(group, position) for position, group in enumerate(rewarded, first)]


def summarise_update(
    rewarded: Sequence[RewardedGroup], kl: Values, totals: Values, advantages: Values
) -> list[Summary]:
    """The summaries of a whole step with the values of its update: (P, G) each, `kl` may be empty."""
    kl = kl or [()] * len(rewarded)
    return [
        replace(summary, kl=tuple(kl[p]), totals=tuple(totals[p]), advantages=tuple(advantages[p]))
        for p, summary in enumerate(summarise(rewarded))
    ]


def _summary(group: RewardedGroup, position: int) -> Summary:
    problem, reference = group.group.problem, group.reference
    rewards = [one.reward for one in group.rewards if one.reward is not None]
    return Summary(
        position,
        problem.id,
        problem.kind,
        problem.question,
        reference.text,
        reference.majority,
        reference.num_votes,
        agrees_with_majority(group),
        differs_from_all(group),
        no_variance=len(set(rewards)) == 1,
        truncated=sum(rollout.finish_reason == "length" for rollout in group.group.rollouts),
        abstained=sum(v.satisfied is None for one in group.rewards for v in one.verdicts),
        mean_reward=mean(rewards) if rewards else None,
        reward_std=std(rewards) if rewards else None,
        mean_tokens=mean(len(rollout.token_ids) for rollout in group.group.rollouts),
    )
