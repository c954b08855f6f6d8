"""Logprobs of tokens through the LM head, in tiles of tokens: (tokens x vocabulary) never exists at once.

If each token's part of the loss needs that token alone, one pass over a tile is enough. It computes logits,
logprobs, their gradient by hand, and from it the gradients of the hidden states and of the head's weight.
That takes 6 VH operations a token. A loss that needs a whole sequence first (GSPO) takes two passes, 8 VH.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cat_grpo.learner.grpo import at_least_float32

TILE_TOKENS = 1024

LossOfTokens = Callable[[Tensor, slice], Tensor]
"""A function from some tokens' logprobs, and which tokens they are, to their part of the loss, a scalar."""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_of: LossOfTokens,
    temperature: float = 1.0,
    separable: bool = True,
    tile_tokens: int = TILE_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, with gradients for `hidden` and `weight`, and each token's logprob and entropy, without any.

    (N, H), (V, H), (N,) -> (), (N,), (N,). hidden[t] predicts token_ids[t]. If `separable`, `loss_of` is
    called on one slice at a time and its results are added. Otherwise it is called once with all tokens.
    """
    return _HeadLoss.apply(hidden, weight, token_ids, loss_of, temperature, separable, tile_tokens)


@torch.no_grad()
def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """log pi of each token, without a gradient: (N, H), (V, H), (N,) -> (N,)."""
    weight = weight.to(hidden.dtype)
    parts = [
        _chosen(_logits(hidden[at], weight, temperature), token_ids[at])[0]
        for at in _tiles(len(token_ids), tile_tokens)
    ]
    return torch.cat(parts) if parts else at_least_float32(hidden.new_zeros(0))


def head_bytes(weight: Tensor, tile_tokens: int = TILE_TOKENS) -> int:
    """The most bytes that `head_loss` takes beside its arguments: three tiles, the gradient of the weight,
    its scaled copy, and the weight and a term of its gradient in a lower precision."""
    return 4 * 3 * tile_tokens * weight.shape[0] + (4 + 4 + 2 + 2) * weight.numel()


class _HeadLoss(torch.autograd.Function):
    """The forward pass makes the gradients, tile by tile. The backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        loss_of: LossOfTokens,
        temperature: float,
        separable: bool,
        tile_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _tiles(len(token_ids), tile_tokens)
        computed = weight.to(hidden.dtype)
        if separable:
            loss, per_token_grad = at_least_float32(hidden.new_zeros(())), None
        else:
            loss, per_token_grad = _value_and_grad(
                loss_of, head_logprobs(hidden, computed, token_ids, temperature, tile_tokens), slice(None)
            )
        hidden_grad = torch.empty_like(hidden)
        is_trained = ctx.needs_input_grad[1]
        weight_grad = at_least_float32(torch.zeros_like(weight if is_trained else weight[:0]))
        logprobs, entropies = [], []
        for at in tiles:
            logits = _logits(hidden[at], computed, temperature)
            logprob, entropy, probs = _chosen(logits, token_ids[at])
            if per_token_grad is None:
                part, grad = _value_and_grad(loss_of, logprob, at)
                loss = loss + part
            else:
                grad = per_token_grad[at]
            # d log pi(y) / d logits = (onehot(y) - p) / temperature, written over p
            logits_grad = probs.mul_(-grad.unsqueeze(-1))
            logits_grad.scatter_add_(-1, token_ids[at].unsqueeze(-1), grad.unsqueeze(-1))
            logits_grad = logits_grad.div_(temperature).to(hidden.dtype)
            hidden_grad[at] = logits_grad @ computed
            if is_trained and weight_grad.dtype == hidden.dtype:
                weight_grad.addmm_(logits_grad.T, hidden[at])  # no second (V, H)
            elif is_trained:
                weight_grad += logits_grad.T @ hidden[at]
            logprobs.append(logprob)
            entropies.append(entropy)
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        empty = [loss.new_zeros(0)]
        outputs = loss, torch.cat(logprobs or empty), torch.cat(entropies or empty)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        of_weight = grads[0] * weight_grad if ctx.needs_input_grad[1] else None
        return grads[0].to(hidden_grad.dtype) * hidden_grad, of_weight, *([None] * 5)


def _tiles(num_tokens: int, tile_tokens: int) -> list[slice]:
    return [slice(start, min(start + tile_tokens, num_tokens)) for start in range(0, num_tokens, tile_tokens)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return at_least_float32(hidden @ weight.T) / temperature


def _chosen(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logprob of each token, the entropy, (N,) both, and the probabilities, (N, V), of logits (N, V)."""
    log_norm = logits.logsumexp(-1, keepdim=True)
    logprobs = logits.sub_(log_norm)
    logprob = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    probs = logprobs.exp()
    return logprob, -torch.linalg.vecdot(probs, logprobs), probs


def _value_and_grad(loss_of: LossOfTokens, logprobs: Tensor, at: slice) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        loss = loss_of(logprobs, at)
        (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad
