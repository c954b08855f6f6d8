"""Stage 4: scored groups become advantages, and rollouts become padded tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_grpo.config import LearnerConfig
from cat_grpo.grpo import group_advantages
from cat_grpo.records import ScoredGroup


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One rollout as the learner sees it: ids as the engine returned them, never tokenised again."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The engine's own, at the sampling temperature."""
    advantage: float


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one step that have a reward."""

    rows: tuple[TrainingRow, ...]

    @property
    def with_signal(self) -> tuple[TrainingRow, ...]:
        """The rows whose gradient is not zero. Leaving the others out of the backward pass is exact."""
        return tuple(row for row in self.rows if row.advantage != 0.0)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Prompts padded on the left, completions on the right: they meet at one column."""

    input_ids: Tensor
    """(B, prompt + completion)."""
    attention_mask: Tensor
    """(B, prompt + completion), 0 on padding."""
    loss_mask: Tensor
    """(B, completion), True on tokens that the policy sampled."""
    advantages: Tensor
    """(B, 1)."""
    sampling_logprobs: Tensor
    """(B, completion), 0 on padding."""


def total_rewards(scored: Sequence[ScoredGroup], kl: Sequence[Sequence[float]], kl_coef: float) -> Tensor:
    """reward - penalty - kl_coef * KL of each rollout: (P, G), float64, NaN where it could not be judged.

    `kl` has one sum over tokens per rollout, in the groups' order; it is not read when kl_coef is 0.
    """
    return torch.tensor(
        [
            [
                math.nan
                if score.reward is None
                else score.reward - score.penalty - (kl_coef * kl[p][g] if kl_coef else 0.0)
                for g, score in enumerate(group.scores)
            ]
            for p, group in enumerate(scored)
        ],
        dtype=torch.float64,
    )


def make_batch(scored: Sequence[ScoredGroup], rewards: Tensor, config: LearnerConfig) -> Batch:
    """The rollouts with a reward, each with its advantage (CaT eq. 5). `rewards` is (P, G), NaN for none."""
    advantages = group_advantages(rewards, config.advantage_scale).tolist()
    rows = [
        TrainingRow(group.group.prompt_token_ids, rollout.token_ids, rollout.logprobs, advantages[p][g])
        for p, group in enumerate(scored)
        for g, rollout in enumerate(group.group.rollouts)
        if group.scores[g].reward is not None
    ]
    return Batch(tuple(rows))


def micro_batches(rows: Sequence[TrainingRow], max_tokens: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """The rows, longest first, in batches of at most `max_tokens` positions with padding.

    ValueError for a row that is longer than that by itself.
    """
    batch: list[TrainingRow] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt_token_ids) - len(row.token_ids)):
        if len(row.prompt_token_ids) + len(row.token_ids) > max_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens: {max_tokens} holds no rollout of "
                f"{len(row.prompt_token_ids)} + {len(row.token_ids)} tokens"
            )
        if batch and _padded_size([*batch, row]) > max_tokens:
            yield _pad(batch, pad_token_id)
            batch = []
        batch.append(row)
    if batch:
        yield _pad(batch, pad_token_id)


def _padded_size(rows: Sequence[TrainingRow]) -> int:
    width = max(len(row.prompt_token_ids) for row in rows) + max(len(row.token_ids) for row in rows)
    return len(rows) * width


def _pad(rows: Sequence[TrainingRow], pad_token_id: int) -> MicroBatch:
    longest_prompt = max(len(row.prompt_token_ids) for row in rows)
    longest = max(len(row.token_ids) for row in rows)
    input_ids = torch.full((len(rows), longest_prompt + longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    sampling_logprobs = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        start, end = longest_prompt - len(row.prompt_token_ids), longest_prompt + len(row.token_ids)
        input_ids[i, start:end] = torch.tensor(row.prompt_token_ids + row.token_ids)
        attention_mask[i, start:end] = 1
        sampling_logprobs[i, : len(row.token_ids)] = torch.tensor(row.logprobs)
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_mask=attention_mask[:, longest_prompt:].bool(),
        advantages=torch.tensor([[row.advantage] for row in rows]),
        sampling_logprobs=sampling_logprobs,
    )
