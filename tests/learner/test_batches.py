"""From rewarded groups to packed tensors: the layout by hand, the budget, and who is left out."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cat_grpo.config import LearnerConfig
from cat_grpo.errors import BadInput
from cat_grpo.learner.batches import (
    Batch,
    MicroBatch,
    TrainingRow,
    make_batch,
    micro_batches,
    rollout_kl,
    total_rewards,
)
from cat_grpo.learner.grpo import group_advantages
from cat_grpo.records import Completion, Group, Problem, Reference, RewardedGroup, RolloutReward


def rewarded_group(rewards: Sequence[float | None], penalties: Sequence[float] = ()) -> RewardedGroup:
    """A group whose rollout i is the ids (10 + i, 1) with the logprobs (-i, -0.5)."""
    rollouts = tuple(Completion("", (10 + i, 1), (-float(i), -0.5), "stop") for i in range(len(rewards)))
    problem = Problem("p", ({"role": "user", "content": "?"},), "verifiable")
    penalties = penalties or [0.0] * len(rewards)
    return RewardedGroup(
        Group(problem, (7, 8), rollouts),
        Reference("text"),
        None,
        tuple(RolloutReward(r, p) for r, p in zip(rewards, penalties, strict=True)),
    )


def batch_of(
    rewarded: Sequence[RewardedGroup],
    config: LearnerConfig,
    kl: Sequence[Sequence[float]] = (),
    kl_coef: float = 0.0,
    anchor_logprobs: Sequence[Sequence[tuple[float, ...]]] = (),
) -> Batch:
    """As a step makes it, of rollouts of at most ten tokens."""
    advantages = group_advantages(total_rewards(rewarded, kl, kl_coef), config.advantage_scale)
    return make_batch(rewarded, advantages, config, max_tokens=10, anchor_logprobs=anchor_logprobs)


def row_of(prompt: Sequence[int], completion: Sequence[int], advantage: float = 1.0) -> TrainingRow:
    """A row whose every token has its own logprob."""
    logprobs = tuple(-0.1 * (i + 1) for i in range(len(completion)))
    return TrainingRow(tuple(prompt), tuple(completion), logprobs, advantage, weight=0.25)


def random_rows(seed: int, num_groups: int = 12, group_size: int = 5) -> list[TrainingRow]:
    rng = random.Random(seed)
    rows = []
    for _ in range(num_groups):
        prompt = rng.choices(range(1, 50), k=rng.randint(1, 30))
        for _ in range(group_size):
            completion = rng.choices(range(1, 50), k=rng.randint(1, 20))
            rows.append(replace(row_of(prompt, completion, rng.gauss(0, 1)), weight=rng.random()))
    return rows


def unpacked(batch: MicroBatch) -> list[tuple]:
    """(prompt, completion, logprobs, advantage, weight) of each rollout, read back from the pack.

    The prompt is the span that the place ahead of the first token ends: its positions count from 0.
    """
    found = []
    for row in range(int(batch.row.max()) + 1):
        of_row = batch.row == row
        end = int(batch.predictors[of_row][0]) + 1
        start = end - 1 - int(batch.position_ids[0, end - 1])
        (advantage,), (weight,) = (set(x[of_row].tolist()) for x in (batch.advantages, batch.weights))
        found.append(
            (
                tuple(batch.input_ids[0, start:end].tolist()),
                tuple(batch.token_ids[of_row].tolist()),
                tuple(batch.sampling_logprobs[of_row].tolist()),
                advantage,
                weight,
            )
        )
    return found


def test_the_layout_by_hand():
    rows = [row_of((5, 6), (7, 8, 9), 2.0), row_of((4,), (3, 2), -1.0), row_of((5, 6), (1,), -2.0)]
    (batch,) = micro_batches(rows, max_tokens=6)
    # The prompt 5 6 once, then 7 8 of its first rollout and nothing of its second; the other prompt, then 3.
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 4, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.token_ids.tolist() == [7, 8, 9, 1, 3, 2]
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4, 5]  # 6 says 7 and 1; 7 says 8, 8 says 9; 4 says 3
    assert batch.row.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.advantages.tolist() == [2, 2, 2, -2, -1, -1]
    assert batch.weights.tolist() == [0.25] * 6
    assert batch.sampling_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.1, -0.1, -0.2])
    prompts, first, second = batch.layout.spans
    assert prompts.index.tolist() == [[0, 1], [4, 4]]
    assert prompts.filled.tolist() == [0, 1, 2]  # the second prompt's second place only fills up
    assert (first.prompt, first.index.tolist()) == (slice(0, 2), [[2, 3]])
    assert first.visible.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert (second.prompt, second.index.tolist()) == (slice(4, 5), [[5]])
    assert batch.layout.order.tolist() == [0, 1, 3, 4, 2, 5]  # the spans' tokens are 0 1 4, 2 3, 5


def test_one_token_less_makes_two_packs():
    # 2 + 2 + 0 tokens of the first prompt and 1 + 1 of the second are 6.
    rows = [row_of((5, 6), (7, 8, 9)), row_of((5, 6), (1,)), row_of((4,), (3, 2))]
    assert [pack.input_ids.shape[1] for pack in micro_batches(rows, 6)] == [6]
    assert [pack.input_ids.shape[1] for pack in micro_batches(rows, 5)] == [4, 2]


def test_a_group_that_fits_into_a_pack_stays_whole():
    # 3 tokens are taken when the group of 2 + 2 + 2 comes: it fits into 8 alone, and not behind them.
    rows = [row_of((1, 1), (2, 2)), row_of((5, 6), (7, 8, 9)), row_of((5, 6), (9, 8, 7))]
    assert [pack.input_ids.tolist() for pack in micro_batches(rows, 8)] == [
        [[1, 1, 2]],
        [[5, 6, 7, 8, 9, 8]],
    ]


def test_a_group_over_the_budget_repeats_its_prompt():
    rows = [row_of((5, 6), (7, 8, 9))] * 3
    assert [pack.input_ids.tolist() for pack in micro_batches(rows, 6)] == [
        [[5, 6, 7, 8, 7, 8]],
        [[5, 6, 7, 8]],
    ]


@pytest.mark.parametrize("max_tokens", [50, 64, 200, 1000, 10_000])
def test_every_row_is_there_once_with_what_is_its_own(max_tokens: int):
    rows = random_rows(seed=max_tokens)
    packs = list(micro_batches(rows, max_tokens))
    assert all(pack.input_ids.numel() <= max_tokens for pack in packs)
    found = Counter(row for pack in packs for row in unpacked(pack))
    expected = [(r.prompt_token_ids, r.token_ids, r.logprobs, r.advantage, r.weight) for r in rows]
    assert found == Counter(expected)


def test_every_place_of_a_pack_is_attended_once():
    for pack in micro_batches(random_rows(seed=1), 300):
        places = torch.cat([part.index.flatten()[part.filled] for part in pack.layout.spans])
        assert sorted(places.tolist()) == list(range(pack.input_ids.shape[1]))


def test_prompts_stand_once():
    rows = random_rows(seed=2)
    prompts = {row.prompt_token_ids for row in rows}
    (pack,) = micro_batches(rows, 10_000)
    assert pack.input_ids.numel() == sum(map(len, prompts)) + sum(len(row.token_ids) - 1 for row in rows)


def test_no_rows_make_no_pack():
    assert list(micro_batches([], 64)) == []


def test_a_row_over_the_budget_names_its_sizes():
    row = row_of((1,) * 40, (2,) * 25)  # its last token is not read
    assert len(list(micro_batches([row], 64))) == 1
    with pytest.raises(BadInput, match=r"learner\.micro_batch_tokens: 63 is too small .* 40 \+ 25 tokens"):
        list(micro_batches([row], 63))


def test_total_rewards_by_hand():
    # 0.75 - 0.5 - 0.1 * 2 = 0.05;  1 - 0 - 0.1 * (-3) = 1.3;  0 - 0.5 - 0.1 * 0 = -0.5.
    rewarded = [rewarded_group([0.75, 1.0], [0.5, 0.0]), rewarded_group([None, 0.0], [0.5, 0.5])]
    rewards = total_rewards(rewarded, kl=[[2.0, -3.0], [9.0, 0.0]], kl_coef=0.1)
    expected = torch.tensor([[0.05, 1.3], [math.nan, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, equal_nan=True)


def test_without_kl_none_is_subtracted():
    assert total_rewards([rewarded_group([1.0, 0.0])], kl=[], kl_coef=0.1).tolist() == [[1.0, 0.0]]


def test_the_kl_of_a_rollout_by_hand():
    # Logprob gaps of 1 and -2: k1 sums to -1 and k2 to 1/2 + 2; over a mean of two tokens half of that.
    policy, anchor = [[(-1.0, -3.0)]], [[(-2.0, -1.0)]]
    for estimator, over, expected in (
        ("k1", "sum", -1.0),
        ("k1", "mean", -0.5),
        ("k2", "sum", 2.5),
        ("k2", "mean", 1.25),
        ("k3", "sum", math.exp(-1) - 1 + 1 + math.exp(2) - 1 - 2),
    ):
        config = LearnerConfig(kl_estimator=estimator, kl_over_tokens=over)
        assert rollout_kl(policy, anchor, config) == [[pytest.approx(expected)]]


@pytest.mark.parametrize(
    ("mean_over", "expected"),
    [
        ("sequence", [1 / 3 / 2] * 3),  # three rollouts of two tokens each
        ("token", [1 / 6] * 3),
        ("constant", [1 / 30] * 3),  # at most ten tokens each
    ],
)
def test_what_a_token_counts_for_knows_the_whole_step(mean_over, expected: list[float]):
    rewarded = [
        rewarded_group([1.0, None, 0.0]),
        rewarded_group([None, 1.0, None]),
    ]  # one without signal counts too
    config = LearnerConfig(mean_over=mean_over)
    batch = batch_of(rewarded, config)
    assert [row.weight for row in batch.rows] == pytest.approx(expected)


def test_where_the_kl_is_in_the_loss_every_rollout_has_a_gradient():
    rewarded = [rewarded_group([1.0, 1.0])]
    anchor = [[(-1.0, -2.0), (-3.0, -4.0)]]
    batch = batch_of(rewarded, LearnerConfig(), anchor_logprobs=anchor)
    assert [row.anchor_logprobs for row in batch.with_signal] == anchor[0]
    (pack,) = micro_batches(batch.with_signal, 64)
    assert pack.anchor_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_rollouts_without_a_reward_leave_and_the_others_are_compared_without_them():
    # Of 1 and 0 alone the advantages are +-1/sqrt 2 (test_grpo); rollout 1 is gone from the rows.
    rewarded = [rewarded_group([1.0, None, 0.0])]
    batch = batch_of(rewarded, LearnerConfig())
    assert [row.token_ids for row in batch.rows] == [(10, 1), (12, 1)]
    assert [row.logprobs for row in batch.rows] == [(0.0, -0.5), (-2.0, -0.5)]
    assert [row.prompt_token_ids for row in batch.rows] == [(7, 8)] * 2
    assert [row.advantage for row in batch.rows] == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


def test_advantages_are_made_of_the_total_and_scaled_as_asked():
    # Rewards are equal, the KL is not: 1 - 0.5 * 0.2 and 1 - 0.5 * 0.6, centred +0.1 and -0.1.
    rewarded = [rewarded_group([1.0, 1.0])]
    batch = batch_of(rewarded, LearnerConfig(advantage_scale="none"), [[0.2, 0.6]], 0.5)
    assert [row.advantage for row in batch.rows] == pytest.approx([0.1, -0.1])


def test_a_row_has_the_advantage_that_its_rollout_is_given():
    rewarded = [rewarded_group([1.0, None]), rewarded_group([0.5, 0.5])]
    advantages = torch.tensor([[3.0, 4.0], [-5.0, 0.0]])
    batch = make_batch(rewarded, advantages, LearnerConfig(), 10)
    assert [row.advantage for row in batch.rows] == [3.0, -5.0, 0.0]


def test_rows_with_signal_are_those_of_groups_that_differ():
    rewarded = [rewarded_group([1.0, 1.0]), rewarded_group([1.0, 0.0]), rewarded_group([None, 1.0])]
    batch = batch_of(rewarded, LearnerConfig())
    assert len(batch.rows) == 5  # a dropped rollout is no row; one without signal is, and counts in the mean
    assert [row.token_ids for row in batch.with_signal] == [(10, 1), (11, 1)]
    assert Batch(()).with_signal == ()
