"""Stage 3: rollouts and a reference become rewards (CaT, section 3.2). Each part of a reward is a function.

    async def reward(groups, references, engines, config, seeds) -> list of rows of float | None

One row per group and one value per rollout, in order; None for a rollout that could not be judged, and for
all of a group without a reference that it needs. A part with a rubric returns a PartReward in place of a row.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence

from cat_grpo.config import RewardConfig
from cat_grpo.method.rewards.agreement import agreement
from cat_grpo.method.rewards.rubric import self_rubric
from cat_grpo.records import Completion, PartReward

Reward = Callable[..., Awaitable[Sequence[Sequence[float | None] | PartReward]]]

REWARDS: Mapping[str, Reward] = {"agreement": agreement, "self_rubric": self_rubric}


def weighted_sum(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Returns the reward of one rollout; None where a part that has weight could not be judged."""
    values = [(weight, parts[name]) for name, weight in weights.items() if weight]
    if any(value is None for _, value in values):
        return None
    return math.fsum(weight * value for weight, value in values if value is not None)


def length_penalty(rollout: Completion, config: RewardConfig) -> float:
    """Returns what the rollout loses for being longer than `length_limit` tokens."""
    over = config.length_limit is not None and len(rollout.token_ids) > config.length_limit
    return config.length_penalty if over else 0.0
