"""Stage 4: rewarded groups become advantages, and rollouts become packed tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cat_grpo.config import LearnerConfig
from cat_grpo.errors import BadInput
from cat_grpo.learner.attention import Layout, Spans
from cat_grpo.learner.grpo import (
    constant_weights,
    k1_kl,
    k2_kl,
    k3_kl,
    sequence_mean_weights,
    token_mean_weights,
)
from cat_grpo.records import RewardedGroup

KL_ESTIMATORS = {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One rollout as the learner sees it: ids as the engine returned them, never tokenised again."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The engine's logprobs, at the sampling temperature."""
    advantage: float
    weight: float
    """How much each of its tokens counts in the loss of the step."""
    anchor_logprobs: tuple[float, ...] = ()
    """Empty unless the KL is part of the loss."""

    def __post_init__(self) -> None:
        num_tokens, num_logprobs, num_anchor = map(len, (self.token_ids, self.logprobs, self.anchor_logprobs))
        if num_tokens != num_logprobs or (num_anchor and num_tokens != num_anchor):
            raise ValueError(f"{num_tokens} tokens, {num_logprobs} logprobs, {num_anchor} anchor logprobs")


Pack = dict[tuple[int, ...], list[TrainingRow]]
"""The rollouts of one micro-batch, by prompt."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one step that have a reward."""

    rows: tuple[TrainingRow, ...]

    @property
    def with_signal(self) -> tuple[TrainingRow, ...]:
        """The rows whose gradient is not zero. Leaving the others out of the backward pass is exact."""
        return tuple(row for row in self.rows if row.advantage != 0.0 or row.anchor_logprobs)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts end to end: T tokens, with each prompt once, before its rollouts. N tokens are trained.

    A rollout's last token predicts nothing, so it is not among the T. Its prompt predicts its first token.
    """

    input_ids: Tensor
    """(1, T)."""
    position_ids: Tensor
    """(1, T). Each rollout's positions continue its prompt's, as if it were the only one."""
    layout: Layout
    predictors: Tensor
    """(N,): the place among the T whose hidden state predicts the token."""
    token_ids: Tensor
    """(N,)."""
    row: Tensor
    """(N,): the rollout of the micro-batch that the token belongs to."""
    advantages: Tensor
    """(N,)."""
    weights: Tensor
    """(N,)."""
    sampling_logprobs: Tensor
    """(N,)."""
    anchor_logprobs: Tensor
    """(N,), or (0,) where the KL is not part of the loss."""
    is_idle: bool = False
    """True when a rank computes it, with weights of 0, only to keep in step with the other ranks."""

    def idle(self) -> "MicroBatch":
        return replace(self, weights=torch.zeros_like(self.weights), is_idle=True)

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type is Tensor}
        return replace(self, layout=self.layout.to(device), **moved)


def total_rewards(rewarded: Sequence[RewardedGroup], kl: Sequence[Sequence[float]], kl_coef: float) -> Tensor:
    """reward - penalty - kl_coef * KL of each rollout: (P, G), float64, NaN where it could not be judged.

    `kl` has one estimate per rollout, in the groups' order. When it is empty, no KL is subtracted.
    """
    return torch.tensor(
        [
            [
                math.nan
                if one.reward is None
                else one.reward - one.penalty - (kl_coef * kl[p][g] if kl else 0.0)
                for g, one in enumerate(group.rewards)
            ]
            for p, group in enumerate(rewarded)
        ],
        dtype=torch.float64,
    )


def rollout_kl(
    policy: Sequence[Sequence[tuple[float, ...]]],
    anchor: Sequence[Sequence[tuple[float, ...]]],
    config: LearnerConfig,
) -> list[list[float]]:
    """The estimate of KL(policy || anchor) of each rollout, from its tokens' logprobs: (P, G)."""
    estimate = KL_ESTIMATORS[config.kl_estimator]

    def of_rollout(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
        values = estimate(*(torch.tensor(side, dtype=torch.float64) for side in (ours, theirs)))
        return (values.sum() / (max(len(ours), 1) if config.kl_over_tokens == "mean" else 1)).item()

    return [
        [of_rollout(*pair) for pair in zip(*groups, strict=True)]
        for groups in zip(policy, anchor, strict=True)
    ]


def make_batch(
    rewarded: Sequence[RewardedGroup],
    advantages: Tensor,
    config: LearnerConfig,
    max_tokens: int,
    anchor_logprobs: Sequence[Sequence[tuple[float, ...]]] = (),
) -> Batch:
    """The rollouts with a reward, each with its advantage and the weight of its tokens.

    `advantages` is (P, G). `max_tokens` is the most tokens that a rollout may have. `anchor_logprobs` has an
    entry per rollout, in the groups' order. It is empty unless the KL is part of the loss.
    """
    rows = [
        TrainingRow(
            group.group.prompt_token_ids,
            rollout.token_ids,
            rollout.logprobs,
            advantages[p, g].item(),
            weight=0.0,
            anchor_logprobs=anchor_logprobs[p][g] if anchor_logprobs else (),
        )
        for p, group in enumerate(rewarded)
        for g, rollout in enumerate(group.group.rollouts)
        if group.rewards[g].reward is not None
    ]
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    weights = {
        "sequence": lambda: sequence_mean_weights(lengths, len(rows)),
        "token": lambda: token_mean_weights(lengths, int(lengths.sum())),
        "constant": lambda: constant_weights(lengths, len(rows), max_tokens),
    }[config.mean_over]()
    return Batch(tuple(replace(row, weight=w) for row, w in zip(rows, weights.tolist(), strict=True)))


def micro_batches(rows: Sequence[TrainingRow], max_tokens: int) -> Iterator[MicroBatch]:
    """Yields the rows in packs of at most `max_tokens` tokens. BadInput for a row longer than that."""
    return map(_pack, packs(rows, max_tokens))


def packs(rows: Sequence[TrainingRow], max_tokens: int) -> Iterator[Pack]:
    """Yields the rows of each micro-batch, those of one prompt together. BadInput as in `micro_batches`."""
    groups: Pack = {}
    for row in rows:
        groups.setdefault(row.prompt_token_ids, []).append(row)
    pack: Pack = {}
    size = 0
    for prompt, members in groups.items():
        whole = len(prompt) + sum(_own_length(row) for row in members)
        if pack and size + whole > max_tokens >= whole:  # a group that can stay whole does
            yield pack
            pack, size = {}, 0
        for row in members:
            if len(prompt) + _own_length(row) > max_tokens:
                raise BadInput(
                    f"learner.micro_batch_tokens: {max_tokens} is too small for a rollout of "
                    f"{len(prompt)} + {len(row.token_ids)} tokens"
                )
            if size + _own_length(row) + (0 if prompt in pack else len(prompt)) > max_tokens:
                yield pack
                pack, size = {}, 0
            size += _own_length(row) + (0 if prompt in pack else len(prompt))
            pack.setdefault(prompt, []).append(row)
    if pack:
        yield pack


def _own_length(row: TrainingRow) -> int:
    return max(len(row.token_ids) - 1, 0)


def _pack(groups: Pack) -> MicroBatch:
    input_ids: list[int] = []
    position_ids: list[int] = []
    predictors: list[int] = []
    spans: list[Spans] = []
    prompt_starts: list[int] = []
    for prompt, members in groups.items():
        prompt_starts.append(len(input_ids))
        prompt_end = len(input_ids) + len(prompt)
        input_ids += prompt
        position_ids += range(len(prompt))
        starts: list[int] = []
        for row in members:
            start, own = len(input_ids), _own_length(row)
            predictors += [prompt_end - 1, *range(start, start + own)][: len(row.token_ids)]
            input_ids += row.token_ids[:own]
            position_ids += range(len(prompt), len(prompt) + own)
            starts.append(start)
        with_tokens = [
            (s, _own_length(row)) for s, row in zip(starts, members, strict=True) if _own_length(row)
        ]
        if with_tokens:
            own_starts, own_lengths = zip(*with_tokens, strict=True)
            spans.append(Spans.of(own_starts, own_lengths, slice(prompt_starts[-1], prompt_end)))
    prompts = Spans.of(prompt_starts, [len(prompt) for prompt in groups])
    rows = [row for members in groups.values() for row in members]
    return MicroBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        layout=Layout.of([prompts, *spans]),
        predictors=torch.tensor(predictors),
        token_ids=torch.tensor([token for row in rows for token in row.token_ids]),
        row=torch.tensor([i for i, row in enumerate(rows) for _ in row.token_ids]),
        advantages=_per_token([row.advantage for row in rows], rows),
        weights=_per_token([row.weight for row in rows], rows),
        sampling_logprobs=torch.tensor([x for row in rows for x in row.logprobs], dtype=torch.float64),
        anchor_logprobs=torch.tensor([x for row in rows for x in row.anchor_logprobs], dtype=torch.float64),
    )


def _per_token(values: Sequence[float], rows: Sequence[TrainingRow]) -> Tensor:
    return torch.tensor(
        [value for value, row in zip(values, rows, strict=True) for _ in row.token_ids], dtype=torch.float64
    )
