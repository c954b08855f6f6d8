"""The mathematics of GRPO as pure functions of tensors.

Shapes  P problems, G rollouts per problem; S sequences; N tokens of all completions, end to end, without
        padding; V vocabulary. `row` (N,) is the sequence, 0 to S - 1, that each token belongs to.
Units   logprobs, KL and entropy are in nats; rewards lie in [0, 1]; advantages have no unit.
Papers  GRPO arXiv:2402.03300; CaT arXiv:2509.14234v3 (eq. 5 to 8); Dr. GRPO arXiv:2503.20783;
        DAPO arXiv:2503.14476; GSPO arXiv:2507.18071; CISPO arXiv:2506.13585; k1 in the reward
        arXiv:2510.01555; the estimators of KL, J. Schulman, "Approximating KL divergence" (2020); truncated
        importance sampling, F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL
        training" (2025).

Nothing here knows about models, devices, configs or files. Every loss is a sum over tokens,

    loss = -sum_t weight_t * (importance_t * surrogate_t - kl_coef * KL_t),

whose weights are known before the first forward pass. So a step may be cut into micro-batches anywhere, and
the gradient is the same to rounding.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]

NO_SIGNAL = 1e-8
"""A standard deviation below this is rounding, not signal."""


# Advantages


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / std (CaT eq. 5): (P, G) -> (P, G), float64.

    The std is the sample one (n - 1), as in TRL and verl: of the group, of the whole batch, or 1 for
    "none" (Dr. GRPO). A group of equal rewards carries no signal and gets exact zeros. NaN marks a rollout
    without a reward: it is left out of every mean and std and its advantage is 0.
    """
    if rewards.ndim != 2 or not rewards.numel():
        raise ValueError(f"rewards must be (problems, rollouts), got shape {tuple(rewards.shape)}")
    # In float32 equal rewards such as 5/7 do not cancel, and the division would turn rounding into signal.
    rewards = rewards.double()
    present = ~rewards.isnan()
    counts = present.sum(dim=1, keepdim=True)
    centred = torch.where(present, rewards - rewards.nansum(dim=1, keepdim=True) / counts, 0.0)
    group_std = (centred.square().sum(dim=1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
    centred = torch.where(group_std > NO_SIGNAL, centred, 0.0)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / group_std.where(group_std > NO_SIGNAL, 1.0)
    if scale == "batch":
        batch_std = rewards[present].std() if present.sum() > 1 else rewards.new_zeros(())
        return centred / batch_std.where(batch_std > NO_SIGNAL, 1.0)
    raise ValueError(f"unknown advantage scale {scale!r}")


# Logprobs


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) of each token: (..., V), (...) -> (...), float32 at least.

    logits[t] must already be the prediction of token_ids[t].
    """
    logits = at_least_float32(logits) / temperature
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Returns half precision as float32, because it is too coarse for a sum over the vocabulary."""
    return values if values.dtype == torch.float64 else values.float()


# Ratios of the policy to the policy before the step


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, row: Tensor) -> Tensor:
    """rho_t = pi_theta / pi_old of each token (CaT eq. 6): (N,), (N,), (N,) -> (N,)."""
    del row  # every ratio has one signature
    return (logprobs - old_logprobs).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, row: Tensor) -> Tensor:
    """GSPO eq. 7: the geometric mean of a sequence's ratios, at each of its tokens: (N,) three times -> (N,).

    All tokens of a sequence must be among the N.
    """
    log_ratio = logprobs - old_logprobs
    return (_sums(log_ratio, row) / _sums(torch.ones_like(log_ratio), row).clamp(min=1)).exp()[row]


def _sums(values: Tensor, row: Tensor) -> Tensor:
    """The sum over each sequence's tokens: (N,), (N,) -> (S,)."""
    num_rows = int(row.max()) + 1 if row.numel() else 0
    return values.new_zeros(num_rows).index_add(0, row, values)


# Surrogates, to be maximised


def clipped_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (CaT eq. 7; DAPO for two widths): (N,) -> (N,)."""
    del logprobs  # every surrogate has one signature
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def cispo_surrogate(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """sg(min(rho, 1 + clip_high)) A log pi (CISPO eq. 4; like the paper, no lower clip): (N,) -> (N,).

    No token loses its gradient; the clip only bounds its weight.
    """
    del clip_low
    return ratio.detach().clamp(max=1 + clip_high) * advantages * logprobs


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """True on the tokens whose gradient `clipped_surrogate` has cut off: (N,), (N,) -> (N,)."""
    return ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))


def is_capped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """True on the tokens whose weight `cispo_surrogate` has bounded: (N,), (N,) -> (N,)."""
    del advantages, clip_low
    return ratio > 1 + clip_high


# How much a token counts. `lengths` (S,) are the lengths of all sequences of the step, or of a part of it.


def sequence_mean_weights(lengths: Tensor, num_sequences: int) -> Tensor:
    """1 / (|o_i| * num_sequences): the mean over sequences of their means (GRPO, CaT eq. 6): (S,) -> (S,).

    num_sequences counts all sequences of the step, also those without signal.
    """
    return 1.0 / (lengths.double().clamp(min=1) * num_sequences)


def token_mean_weights(lengths: Tensor, num_tokens: int) -> Tensor:
    """1 / num_tokens: every token of the step counts the same (DAPO eq. 8): (S,) -> (S,)."""
    return torch.full(lengths.shape, 1.0 / max(num_tokens, 1), dtype=torch.float64)


def constant_weights(lengths: Tensor, num_sequences: int, max_tokens: int) -> Tensor:
    """1 / (num_sequences * max_tokens): no length in the denominator (Dr. GRPO): (S,) -> (S,)."""
    return torch.full(lengths.shape, 1.0 / max(num_sequences * max_tokens, 1), dtype=torch.float64)


# The gap between the engine that sampled and the learner


def no_importance(old_logprobs: Tensor, sampling_logprobs: Tensor, row: Tensor, cap: float) -> Tensor:
    """1 for each token: the engine's logprobs are taken for the learner's."""
    del sampling_logprobs, row, cap
    return torch.ones_like(old_logprobs)


def token_importance(old_logprobs: Tensor, sampling_logprobs: Tensor, row: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) of each token, without gradient (Yao et al.): (N,) three times -> (N,)."""
    del row
    return (old_logprobs - sampling_logprobs).detach().exp().clamp(max=cap)


def sequence_importance(old_logprobs: Tensor, sampling_logprobs: Tensor, row: Tensor, cap: float) -> Tensor:
    """The product of a sequence's token ratios, capped, at each of its tokens: (N,) three times -> (N,)."""
    log_ratio = (old_logprobs - sampling_logprobs).detach()
    return _sums(log_ratio, row).exp().clamp(max=cap)[row]


# Estimates of KL(policy || anchor) from the policy's own tokens


def k1_kl(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """log pi_theta - log pi_0 per token: any shape -> the same.

    It is unbiased and has either sign. Summed over a rollout and subtracted from its reward, it has the
    gradient of the reverse KL. In the loss, its expected gradient is zero.
    """
    return logprobs - anchor_logprobs


def k2_kl(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """(log pi_theta - log pi_0)^2 / 2: never negative; in the loss it has the gradient of the reverse KL."""
    return 0.5 * (logprobs - anchor_logprobs).square()


def k3_kl(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """pi_0 / pi_theta - 1 - log(pi_0 / pi_theta): never negative, unbiased; in GRPO's loss (eq. 4)."""
    gap = anchor_logprobs - logprobs
    return gap.exp() - 1 - gap


# The loss


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    row: Tensor,
    *,
    ratio: Callable[..., Tensor] = token_ratio,
    surrogate: Callable[..., Tensor] = clipped_surrogate,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance: Tensor | float = 1.0,
    kl: Tensor | float = 0.0,
) -> Tensor:
    """-sum_t weight_t * (importance_t * surrogate_t - kl_t), to be minimised: (N,) each -> ().

    `kl` is already multiplied by its coefficient. Summed over the parts of a step, this is the step's loss.
    ValueError for shapes that differ, and for no tokens at all.
    """
    shapes = [tuple(values.shape) for values in (logprobs, old_logprobs, advantages, weights, row)]
    if len(set(shapes)) > 1 or shapes[0] in ((), (0,)) or len(shapes[0]) > 1:
        raise ValueError(f"logprobs, old_logprobs, advantages, weights and row are not (N,) each: {shapes}")
    gains = surrogate(ratio(logprobs, old_logprobs, row), logprobs, advantages, clip_low, clip_high)
    return -(weights * (importance * gains - kl)).sum()
