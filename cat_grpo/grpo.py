"""The mathematics of GRPO as pure functions of tensors.

Shapes  P problems, G rollouts per problem, B sequences, T tokens, V vocabulary.
Units   logprobs, KL and entropy are in nats; rewards lie in [0, 1]; advantages have no unit.
Papers  GRPO arXiv:2402.03300; CaT arXiv:2509.14234v3 (eq. 5 to 8); Dr. GRPO arXiv:2503.20783;
        DAPO arXiv:2503.14476 (a higher upper clip); k1 in the reward arXiv:2510.01555.

Nothing here knows about models, devices, configs or files.
"""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]

NO_SIGNAL = 1e-8
"""A standard deviation below this is rounding, not signal."""


def group_advantages(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """A_i = (r_i - mean of its group) / std (CaT eq. 5): (P, G) -> (P, G), float64.

    The std is the sample one (n - 1), as in TRL and verl: of the group, of the whole batch, or 1 for
    "none" (Dr. GRPO). A group of equal rewards carries no signal and gets exact zeros. NaN marks a rollout
    without a reward: it is left out of every mean and std and its advantage is 0.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (problems, rollouts), got shape {tuple(rewards.shape)}")
    # In float32 equal rewards such as 5/7 do not cancel, and the division would make signal of the rounding.
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


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) of each token: (B, T, V), (B, T) -> (B, T), float32.

    logits[:, t] must already be the prediction of token_ids[:, t].
    """
    logits = logits.float() / temperature
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
    return chosen - logits.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_v p(v) log p(v) of each position: (B, T, V) -> (B, T)."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) per token, to be maximised (CaT eq. 7).

    rho = pi_theta / pi_old: (B, T), (B, T), (B, 1) -> (B, T).
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """True on the tokens whose gradient the clip has cut off: (B, T), (B, T), (B, 1) -> (B, T)."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))


def sequence_mean(values: Tensor, loss_mask: Tensor, num_sequences: int) -> Tensor:
    """Mean over each sequence's own tokens, summed, over `num_sequences`: (B, T), (B, T) -> ().

    GRPO's reduction (CaT eq. 6). num_sequences is the count of the whole step, not of the micro-batch, so
    that the gradient does not depend on how the step was cut.
    """
    lengths = loss_mask.sum(dim=1).clamp(min=1)
    return ((values * loss_mask).sum(dim=1) / lengths).sum() / num_sequences


def k1_kl(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """The k1 estimate log pi_theta - log pi_0 per token: any shape -> the same.

    Unbiased, and of either sign. Summed over a rollout and subtracted from its reward it has the gradient
    of the reverse KL; put into the loss it would not.
    """
    return logprobs - anchor_logprobs
