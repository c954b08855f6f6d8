"""The maths of GRPO against numbers worked by hand, and against loops that a reader can follow."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cat_grpo.learner.grpo import (
    cispo_surrogate,
    clipped_surrogate,
    constant_weights,
    group_advantages,
    is_clipped,
    k1_kl,
    k2_kl,
    k3_kl,
    sequence_importance,
    sequence_mean_weights,
    sequence_ratio,
    token_importance,
    token_logprobs,
    token_mean_weights,
    token_ratio,
)

NAN = math.nan


def doubles(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_by_hand():
    # Mean 1/4; squares 9/16 + 3 * 1/16 = 3/4, over n - 1 = 3: 1/4; std 1/2. (1 - 1/4) / (1/2) = 3/2.
    assert_close(group_advantages(torch.tensor([[1.0, 0, 0, 0]])), doubles([[1.5, -0.5, -0.5, -0.5]]))


def test_the_std_of_the_batch_by_hand():
    # All of 1, 0, 1, 1: mean 3/4, squares 9/16 + 3 * 1/16 = 3/4, over 3: 1/4; std 1/2.
    # The groups are still centred on their own means, 1/2 and 1.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert_close(group_advantages(rewards, "batch"), doubles([[1, -1], [0, 0]]))


def test_without_a_scale_rewards_are_only_centred():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0]])
    expected = doubles([[0.75, -0.25, -0.25, -0.25], [0, 0, 0.5, -0.5]])
    assert_close(group_advantages(rewards, "none"), expected)


def test_the_group_scale_does_not_see_the_size_of_rewards():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(group_advantages(7 * rewards - 3), group_advantages(rewards))


def test_a_rollout_without_a_reward_is_not_there():
    # Of 1 and 0 alone: mean 1/2, squares 1/4 + 1/4, over 1: std 1/sqrt 2. (1/2) * sqrt 2 = 1/sqrt 2.
    root = 1 / math.sqrt(2)
    assert_close(group_advantages(torch.tensor([[1.0, NAN, 0.0]])), doubles([[root, 0, -root]]))


def test_a_rollout_without_a_reward_is_not_in_the_batch_either():
    # Of 1, 0, 0 alone: mean 1/3, squares 4/9 + 1/9 + 1/9 = 2/3, over 2: std 1/sqrt 3. (1/2) * sqrt 3.
    rewards = torch.tensor([[1.0, 0.0], [NAN, 0.0]])
    half_root = math.sqrt(3) / 2
    assert_close(group_advantages(rewards, "batch"), doubles([[half_root, -half_root], [0, 0]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [NAN, 0.3, NAN], [NAN, 0.3, 0.3]])
def test_what_cannot_be_compared_has_no_advantage(group: list[float], scale):
    assert group_advantages(torch.tensor([group]), scale).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 8, 16, 63])
@pytest.mark.parametrize("reward", [0.0, 1.0, 5 / 7, 7 / 9, 0.1, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_carry_no_signal_at_all(reward: float, group_size: int, scale, dtype: torch.dtype):
    # The sum of three times fl(7/9), over three, need not be fl(7/9): rounding must not become signal.
    # The second group has signal, so that the std of the batch is not 0.
    rewards = torch.stack([torch.full((group_size,), reward), torch.arange(group_size) / group_size])
    rewards = rewards.to(dtype)
    rewards[0] = torch.tensor(reward, dtype=dtype)  # at full precision
    advantages = group_advantages(rewards, scale)
    assert advantages[0].tolist() == [0.0] * group_size
    assert advantages[1].abs().max() > 0.1


def test_a_small_difference_is_signal_and_not_rounding():
    # KL at 1e-3 times a small estimate may be all that tells two rollouts apart: +-1/sqrt 2 at any size.
    root = 1 / math.sqrt(2)
    advantages = group_advantages(doubles([[0.5 + 1e-6, 0.5]]))
    assert_close(advantages, doubles([[root, -root]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(1))
    rewards[rewards < 0.1] = NAN
    sums = group_advantages(rewards, scale).sum(dim=1)
    assert_close(sums, torch.zeros(50, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"\(problems, rollouts\)"):
        group_advantages(torch.zeros(shape))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="unknown advantage scale 'max'"):
        group_advantages(torch.tensor([[1.0, 0.0]]), "max")  # type: ignore[arg-type]


def test_token_logprobs_by_hand():
    # Weights 1 : 3 give 1/4 and 3/4; at temperature 1/2 they are squared, 1 : 9.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    ids = torch.tensor([[0, 1]])
    assert_close(token_logprobs(logits, ids), torch.tensor([[0.25, 0.75]]).log())
    assert_close(token_logprobs(logits, ids, temperature=0.5), torch.tensor([[0.1, 0.9]]).log())


def test_token_logprobs_are_those_of_log_softmax():
    generator = torch.Generator().manual_seed(2)
    logits = 30 * torch.randn(3, 5, 40, generator=generator)
    ids = torch.randint(40, (3, 5), generator=generator)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert_close(token_logprobs(logits, ids, 0.7), expected)


def test_token_logprobs_are_taken_in_float32():
    logits = torch.tensor([[[0.0, 0.0, 0.0]]], dtype=torch.bfloat16)  # in bfloat16 log 3 would be 1.1016
    assert_close(token_logprobs(logits, torch.tensor([[1]])), torch.tensor([[-math.log(3)]]))


def flat(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Values end to end, and the sequence of each."""
    values = torch.tensor([value for row in rows for value in row])
    return values, torch.tensor([i for i, row in enumerate(rows) for _ in row])


def test_clip_by_hand():
    # A gain is capped at rho = 1.3, a loss is not; below 0.8 it is the other way round.
    ratio = torch.tensor([1.5, 1.1, 0.5, 1.5, 1.1, 0.5])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    surrogate = clipped_surrogate(ratio, ratio.log(), advantages, 0.2, 0.3)
    assert_close(surrogate, torch.tensor([2 * 1.3, 2 * 1.1, 2 * 0.5, -2 * 1.5, -2 * 1.1, -2 * 0.8]))


def test_is_clipped_says_where_the_gradient_is_gone():
    ratios = torch.linspace(0.51, 1.49, 50).repeat(3)  # no ratio lies on 0.8 or 1.3 itself
    logprobs, old = ratios.log().requires_grad_(), torch.zeros(150)
    advantages = torch.tensor([1.7, -0.4, 0.9]).repeat_interleave(50)
    ratio = token_ratio(logprobs, old, torch.zeros(150).long())
    clipped_surrogate(ratio, logprobs, advantages, 0.2, 0.3).sum().backward()
    clipped = is_clipped(ratio.detach(), advantages, 0.2, 0.3)
    assert torch.equal(clipped, logprobs.grad == 0.0)
    # The ratios are 0.02 apart: 1.31 to 1.49 are ten, 0.51 to 0.79 are fifteen.
    assert clipped.reshape(3, 50).sum(dim=1).tolist() == [10, 15, 10]


def test_cispo_by_hand():
    # -sg(min(rho, 1.3)) A log pi: the gradient is the bounded ratio times A, and no token is without one.
    logprobs = torch.tensor([-1.0, -2.0, -0.5]).requires_grad_()
    ratio, advantages = torch.tensor([1.5, 1.1, 0.5]), torch.tensor([2.0, -1.0, 2.0])
    surrogate = cispo_surrogate(ratio, logprobs, advantages, 0.2, 0.3)
    assert_close(surrogate, torch.tensor([1.3 * 2 * -1.0, 1.1 * -1 * -2.0, 0.5 * 2 * -0.5]))
    surrogate.sum().backward()
    assert_close(logprobs.grad, torch.tensor([2.6, -1.1, 1.0]))


@pytest.mark.parametrize("surrogate", [clipped_surrogate, cispo_surrogate])
@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_on_policy_every_objective_has_the_gradient_of_reinforce(ratio: Callable, surrogate: Callable):
    # d/dx A exp(x - x0) at x = x0 is A, with nothing clipped, whatever the clip's width. Of a sequence's
    # ratio each of its tokens has a share, and every one of them carries it: A again.
    logprobs, row = flat([[-1.3, -0.2, -2.0], [-0.7, -0.1]])
    logprobs.requires_grad_()
    advantages = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5])
    surrogate(ratio(logprobs, logprobs.detach(), row), logprobs, advantages, 0.0, 0.0).sum().backward()
    assert_close(logprobs.grad, advantages)


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens():
    # (2 * 8)^(1/2) = 4; (1/2)^1; the tokens of the first sequence stand on both sides of the second.
    logprobs = torch.tensor([2.0, 0.5, 8.0]).log()
    ratio = sequence_ratio(logprobs, torch.zeros(3), torch.tensor([0, 1, 0]))
    assert_close(ratio, torch.tensor([4.0, 0.5, 4.0]))


def test_only_the_ratio_to_the_old_policy_counts():
    old, row = flat([[-3.0, -0.1]])
    assert_close(token_ratio(old + math.log(1.1), old, row), torch.full((2,), 1.1))
    assert_close(sequence_ratio(old + math.log(1.1), old, row), torch.full((2,), 1.1))


def test_importance_by_hand():
    # Twice and half as likely: 2 and 1/2, capped at 1.5 and not; together 1.
    old, row = flat([[0.2, 0.1], [0.9]])
    sampling = torch.tensor([0.1, 0.2, 0.1])
    tokens = token_importance(old.log(), sampling.log(), row, cap=1.5)
    sequences = sequence_importance(old.log(), sampling.log(), row, cap=1.5)
    assert_close(tokens, torch.tensor([1.5, 0.5, 1.5]))
    assert_close(sequences, torch.tensor([1.0, 1.0, 1.5]))


@pytest.mark.parametrize("importance", [token_importance, sequence_importance])
def test_importance_is_a_weight_and_has_no_gradient(importance: Callable):
    old, row = flat([[-0.3, -0.1]])
    assert not importance(old.requires_grad_(), torch.zeros(2), row, cap=2.0).requires_grad


def test_weights_by_hand():
    # Sequences of 1 and 4 tokens, of three in the step with 7 tokens in all, at most 10 each.
    lengths = torch.tensor([1, 4])
    assert_close(sequence_mean_weights(lengths, num_sequences=3), doubles([1 / 3, 1 / 12]))
    assert_close(token_mean_weights(lengths, num_tokens=7), doubles([1 / 7, 1 / 7]))
    assert_close(constant_weights(lengths, num_sequences=3, max_tokens=10), doubles([1 / 30, 1 / 30]))


def test_means_are_means():
    # Of values that are all 5: the mean over sequences, and over tokens, is 5.
    lengths = torch.tensor([1, 4, 2])
    for weights in (sequence_mean_weights(lengths, 3), token_mean_weights(lengths, 7)):
        assert_close((5 * weights * lengths).sum(), torch.tensor(5.0, dtype=torch.float64))


def test_a_sequence_without_tokens_is_no_division_by_zero():
    assert sequence_mean_weights(torch.tensor([0]), 2).isfinite().all()
    assert token_mean_weights(torch.tensor([0]), 0).isfinite().all()


def test_kl_by_hand():
    # pi = 1/2 where pi_0 = 1/4: k1 log 2, k2 log^2 2 / 2, k3 1/2 - 1 + log 2; the other way round -log 2, the
    # same square, 2 - 1 - log 2. k1 is the one that may be negative.
    half, quarter = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    log2 = math.log(2)
    assert_close(k1_kl(half, quarter), torch.tensor([log2, -log2]))
    assert_close(k2_kl(half, quarter), torch.tensor([log2**2 / 2, log2**2 / 2]))
    assert_close(k3_kl(half, quarter), torch.tensor([log2 - 0.5, 1 - log2]))


@pytest.mark.parametrize("estimate", [k1_kl, k3_kl])
def test_k1_and_k3_are_the_kl_on_average(estimate: Callable):
    # E under pi = (1/4, 3/4) of the estimate with pi_0 = (1/2, 1/2): the KL itself.
    policy, anchor = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert_close((policy * estimate(policy.log(), anchor.log())).sum(), torch.tensor(kl))


@pytest.mark.parametrize(("estimate", "is_right"), [(k1_kl, False), (k2_kl, True), (k3_kl, False)])
def test_in_the_loss_k2_has_the_gradient_of_the_kl_and_k1_has_none(estimate: Callable, is_right: bool):
    # The mean over pi's own samples of the estimate's gradient, against the gradient of the KL.
    logits, anchor = torch.tensor([0.3, -0.8, 0.1], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    (kl,) = torch.autograd.grad((probs * (logprobs - anchor.log())).sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad((probs.detach() * estimate(logprobs, anchor.log())).sum(), logits)
    assert torch.allclose(ours, kl, atol=1e-6) is is_right
    if estimate is k1_kl:
        assert_close(ours, torch.zeros(3), atol=1e-7, rtol=0)


def test_the_whole_objective_is_that_of_the_papers_loop():
    """CaT eq. 5 to 7 once as loops over plain floats, once as our functions."""
    problems, group_size, length, vocab, temperature, low, high = 3, 4, 6, 11, 0.8, 0.2, 0.3
    generator = torch.Generator().manual_seed(4)
    num = problems * group_size
    logits = 2 * torch.randn(num, length, vocab, generator=generator)
    old_logits = logits + 0.4 * torch.randn(num, length, vocab, generator=generator)
    ids = torch.randint(vocab, (num, length), generator=generator)
    lengths = torch.randint(1, length + 1, (num,), generator=generator)
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.2, 0.4, 0.9, 0.1], [5 / 7, 5 / 7, 5 / 7, 5 / 7]])

    def logprob(scores: Tensor, token: int) -> float:
        weights = [math.exp(score / temperature) for score in scores.tolist()]
        return math.log(weights[token] / sum(weights))

    by_hand = 0.0
    for row in range(num):
        group = rewards[row // group_size].double().tolist()
        centre = sum(group) / group_size
        std = math.sqrt(sum((reward - centre) ** 2 for reward in group) / (group_size - 1))
        advantage = (group[row % group_size] - centre) / std if std > 1e-6 else 0.0
        total = 0.0
        for t in range(int(lengths[row])):
            token = int(ids[row, t])
            ratio = math.exp(logprob(logits[row, t], token) - logprob(old_logits[row, t], token))
            total += min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)
        by_hand += total / int(lengths[row]) / num

    is_token = torch.arange(length) < lengths[:, None]
    row = torch.arange(num).repeat_interleave(lengths)
    logprobs = token_logprobs(logits[is_token], ids[is_token], temperature)
    old_logprobs = token_logprobs(old_logits[is_token], ids[is_token], temperature)
    ratio = token_ratio(logprobs, old_logprobs, row)
    surrogate = clipped_surrogate(ratio, logprobs, group_advantages(rewards).flatten()[row], low, high)
    objective = (sequence_mean_weights(lengths, num)[row] * surrogate).sum()
    assert objective.item() == pytest.approx(by_hand, abs=1e-6)
    assert abs(by_hand) > 1e-3  # not the zero of an on-policy step


def test_functions_leave_their_inputs_and_torch_as_they_were():
    logits, ids = torch.randn(6, 5, generator=torch.Generator().manual_seed(5)), torch.ones(6).long()
    rewards, row = torch.tensor([[1.0, NAN], [0.5, 0.5]]), torch.tensor([0, 0, 0, 1, 1, 1])
    logprobs, lengths = token_logprobs(logits, ids), torch.tensor([3, 3])
    inputs = [logits, ids, rewards, row, logprobs, lengths]
    before = [tensor.clone() for tensor in inputs]

    def state() -> tuple:
        random_state = torch.get_rng_state().tolist()
        return random_state, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()

    state_before = state()
    for scale in ("group", "batch", "none"):
        group_advantages(rewards, scale)
    for ratio in (token_ratio, sequence_ratio):
        ratio(logprobs, logprobs, row)
    for surrogate in (clipped_surrogate, cispo_surrogate):
        surrogate(logprobs, logprobs, logprobs, 0.2, 0.2)
    is_clipped(logprobs, logprobs, 0.2, 0.2)
    for importance in (token_importance, sequence_importance):
        importance(logprobs, logprobs, row, 2.0)
    for estimate in (k1_kl, k2_kl, k3_kl):
        estimate(logprobs, logprobs)
    sequence_mean_weights(lengths, 2), token_mean_weights(lengths, 6), constant_weights(lengths, 2, 3)
    assert state() == state_before
    for tensor, old in zip(inputs, before, strict=True):
        assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)
