"""The tiled head against the plain one, which has all logits at once."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cat_grpo.learner.grpo import clipped_surrogate, sequence_ratio, token_logprobs, token_ratio
from cat_grpo.learner.lm_head import head_logprobs, head_loss

N, H, V, TEMPERATURE = 13, 6, 29, 0.7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    token_ids = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), token_ids


def objective(ratio, logprobs: Tensor, at: slice) -> Tensor:
    """A loss of every kind of part: weights, signs, a clip that cuts, and a penalty."""
    generator = torch.Generator().manual_seed(1)
    old = -3 * torch.rand(N, generator=generator, dtype=torch.float64)
    advantages = torch.randn(N, generator=generator, dtype=torch.float64)
    row = torch.arange(N) // 4
    values = clipped_surrogate(ratio(logprobs, old[at], row[at]), logprobs, advantages[at], 0.2, 0.3)
    return -(values - 0.1 * logprobs.square()).sum() / N


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    return torch.distributions.Categorical(logits=logits / temperature).entropy()


def plain(ratio) -> list[Tensor]:
    """Loss, logprobs, entropy, and the gradients of hidden states and weight, by autograd alone."""
    hidden, weight, token_ids = inputs()
    logits = hidden @ weight.T
    logprobs = token_logprobs(logits, token_ids, TEMPERATURE)
    loss = objective(ratio, logprobs, slice(None))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [loss.detach(), logprobs.detach(), token_entropy(logits, TEMPERATURE).detach(), *gradients]


@pytest.mark.parametrize("tile_tokens", [1, 4, 13, 1000])
@pytest.mark.parametrize(
    ("ratio", "separable"), [(token_ratio, True), (token_ratio, False), (sequence_ratio, False)]
)
def test_tiles_change_nothing(tile_tokens: int, ratio, separable: bool):
    hidden, weight, token_ids = inputs()
    loss, logprobs, entropy = head_loss(
        hidden, weight, token_ids, partial(objective, ratio), TEMPERATURE, separable, tile_tokens
    )
    loss.backward()
    ours = [loss.detach(), logprobs, entropy, hidden.grad, weight.grad]
    assert_close(ours, plain(ratio), rtol=0, atol=1e-12)


def test_entropy_by_hand():
    # Uniform over V: log V. Weights 1 : 3: -(1/4) log(1/4) - (3/4) log(3/4), at temperature 1/2 of 1 : 9.
    def entropy(logits: Tensor, num_tokens: int, temperature: float = 1.0) -> Tensor:
        hidden, weight, token_ids = torch.ones(num_tokens, 1), logits[:, None], torch.zeros(num_tokens).long()
        return head_loss(hidden, weight, token_ids, lambda logprobs, at: -logprobs.sum(), temperature)[2]

    assert_close(entropy(torch.full((50,), -7.0), 6), torch.full((6,), math.log(50)))
    logits = torch.tensor([0.0, math.log(3)])
    assert_close(entropy(logits, 1), torch.tensor([0.25 * math.log(4) + 0.75 * math.log(4 / 3)]))
    assert_close(entropy(logits, 1, 0.5), torch.tensor([0.1 * math.log(10) + 0.9 * math.log(10 / 9)]))


def test_the_gradient_is_that_of_finite_differences():
    hidden, weight, token_ids = inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_loss(hidden, weight, token_ids, partial(objective, token_ratio), TEMPERATURE, True, 5)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_a_scaled_loss_has_a_scaled_gradient():
    gradients = []
    for scale in (1.0, 3.0):
        hidden, weight, token_ids = inputs()
        loss = head_loss(hidden, weight, token_ids, partial(objective, token_ratio))[0]
        (scale * loss).backward()
        gradients.append((hidden.grad, weight.grad))
    assert_close(gradients[1], tuple(3 * gradient for gradient in gradients[0]))


def test_a_gradient_of_many_tiles_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 4, generator=generator).bfloat16()
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    token_ids = torch.zeros(4096).long()
    options = {"tile_tokens": 4}
    head_loss(hidden, weight, token_ids, lambda logprobs, at: -logprobs.sum(), **options)[0].backward()
    exact = weight.detach().double().requires_grad_()
    (-token_logprobs(hidden.double() @ exact.T, token_ids).sum()).backward()
    gap = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert gap < 4e-3  # bfloat16 has eight bits: 1,024 terms added in it are off by far more


def test_half_precision_is_summed_in_float32():
    hidden, weight, token_ids = inputs(torch.bfloat16)
    loss, logprobs, entropy = head_loss(hidden, weight, token_ids, lambda logprobs, at: -logprobs.sum())
    loss.backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    assert_close(logprobs, token_logprobs(logits, token_ids).detach())
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_logprobs_alone():
    hidden, weight, token_ids = inputs()
    expected = token_logprobs(hidden @ weight.T, token_ids, TEMPERATURE).detach()
    ours = head_logprobs(hidden, weight, token_ids, TEMPERATURE, tile_tokens=4)
    assert not ours.requires_grad
    assert_close(ours, expected)


def test_no_tokens_are_no_loss():
    hidden, weight, _ = inputs()
    loss, logprobs, entropy = head_loss(
        hidden[:0], weight, torch.zeros(0).long(), lambda logprobs, at: logprobs.sum()
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.shape == entropy.shape == (0,)
    assert not weight.grad.any()


def test_all_logits_never_exist_at_once():
    """The largest tensor that is made has the size of a tile of logits, not of all of them."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    hidden, weight, token_ids = inputs()
    with Watch():
        head_loss(hidden, weight, token_ids, lambda logprobs, at: logprobs.sum(), tile_tokens=2)[0].backward()
    assert max(sizes) == V * H  # the weight itself: tiles are 2 * V
    assert max(sizes) < N * V
