"""From scored groups to padded tensors: the layout by hand, the budget, and who is left out."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from cat_grpo.batches import Batch, MicroBatch, TrainingRow, make_batch, micro_batches, total_rewards
from cat_grpo.config import LearnerConfig
from cat_grpo.records import Completion, Group, Problem, Reference, RolloutScore, ScoredGroup

PAD = 0


def scored_group(rewards: Sequence[float | None], penalties: Sequence[float] = ()) -> ScoredGroup:
    """A group whose rollout i is the ids (10 + i, 1) with the logprobs (-i, -0.5)."""
    rollouts = tuple(Completion("", (10 + i, 1), (-float(i), -0.5), "stop") for i in range(len(rewards)))
    problem = Problem("p", ({"role": "user", "content": "?"},), "verifiable")
    penalties = penalties or [0.0] * len(rewards)
    return ScoredGroup(
        Group(problem, (7, 8), rollouts),
        Reference("p", "text", "synthesis", "", 1, "stop", None, 0),
        None,
        tuple(RolloutScore(r, p, None, ()) for r, p in zip(rewards, penalties, strict=True)),
    )


def random_rows(seed: int, num: int = 60) -> list[TrainingRow]:
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        prompt = tuple(rng.choices(range(1, 50), k=rng.randint(1, 30)))
        completion = tuple(rng.choices(range(1, 50), k=rng.randint(1, 20)))
        rows.append(TrainingRow(prompt, completion, tuple(-rng.random() for _ in completion), rng.random()))
    return rows


def unpadded(batch: MicroBatch) -> list[tuple]:
    """The rows that a micro-batch was made of, read back from its masks."""
    width = batch.input_ids.shape[1] - batch.loss_mask.shape[1]
    rows = []
    for i in range(len(batch.input_ids)):
        prompt = batch.input_ids[i, :width][batch.attention_mask[i, :width].bool()]
        completion = batch.input_ids[i, width:][batch.loss_mask[i]]
        logprobs = batch.sampling_logprobs[i][batch.loss_mask[i]]
        rows.append((*map(tuple, (prompt.tolist(), completion.tolist(), logprobs.tolist())),))
    return rows


def test_the_layout_by_hand():
    rows = [
        TrainingRow((4,), (3, 2, 1), (-0.1, -0.2, -0.3), -1.0),
        TrainingRow((5, 6, 7), (8, 9), (-0.5, -0.6), 2.0),
    ]
    (batch,) = micro_batches(rows, max_tokens=12, pad_token_id=PAD)  # 2 rows of 3 + 3 columns
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0], [0, 0, 4, 3, 2, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.loss_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.advantages.tolist() == [[2.0], [-1.0]]
    expected = torch.tensor([[-0.5, -0.6, 0.0], [-0.1, -0.2, -0.3]])
    assert torch.equal(batch.sampling_logprobs, expected)


def test_one_position_less_makes_two_batches():
    # 6 columns wide the two rows take 12 positions: with 11 each stands alone, 5 and 4 wide.
    rows = [TrainingRow((4,), (3, 2, 1), (0.0,) * 3, 1.0), TrainingRow((5, 6, 7), (8, 9), (0.0,) * 2, 1.0)]
    batches = list(micro_batches(rows, max_tokens=11, pad_token_id=PAD))
    assert [list(batch.input_ids.shape) for batch in batches] == [[1, 5], [1, 4]]


def test_the_pad_token_is_masked_by_place_and_not_by_id():
    row = TrainingRow((PAD, 5), (PAD, PAD), (-1.0, -1.0), 1.0)
    (batch,) = micro_batches([row], max_tokens=64, pad_token_id=PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1]]
    assert batch.loss_mask.tolist() == [[True, True]]


@pytest.mark.parametrize("max_tokens", [50, 64, 200, 1000, 10_000])
def test_every_row_is_there_once_and_the_budget_holds(max_tokens: int):
    rows = random_rows(seed=max_tokens)
    batches = list(micro_batches(rows, max_tokens, PAD))
    assert all(batch.input_ids.numel() <= max_tokens for batch in batches)
    found = Counter(row[:2] for batch in batches for row in unpadded(batch))
    assert found == Counter((row.prompt_token_ids, row.token_ids) for row in rows)


def test_a_rows_logprobs_and_advantage_go_with_it():
    rows = random_rows(seed=1)
    by_ids = {(row.prompt_token_ids, row.token_ids): row for row in rows}
    for batch in micro_batches(rows, 300, PAD):
        for (prompt, completion, logprobs), advantage in zip(unpadded(batch), batch.advantages, strict=True):
            row = by_ids[prompt, completion]
            assert logprobs == pytest.approx(row.logprobs)
            assert advantage.item() == pytest.approx(row.advantage)
        assert batch.sampling_logprobs[~batch.loss_mask].abs().sum() == 0


def test_rows_of_a_length_share_a_batch_as_far_as_the_budget_goes():
    # 10 rows of 3 + 2 positions, 4 to a batch of at most 20 positions: 4, 4 and 2.
    rows = [TrainingRow((1, 2, 3), (4, 5), (0.0, 0.0), 1.0)] * 10
    assert [len(batch.input_ids) for batch in micro_batches(rows, 20, PAD)] == [4, 4, 2]


def test_no_rows_make_no_batch():
    assert list(micro_batches([], 64, PAD)) == []


def test_a_row_over_the_budget_names_its_sizes():
    row = TrainingRow((1,) * 40, (2,) * 25, (0.0,) * 25, 1.0)
    assert len(list(micro_batches([row], 65, PAD))) == 1
    with pytest.raises(ValueError, match=r"learner\.micro_batch_tokens: 64 holds no .* 40 \+ 25 tokens"):
        list(micro_batches([row], 64, PAD))


def test_total_rewards_by_hand():
    # 0.75 - 0.5 - 0.1 * 2 = 0.05;  1 - 0 - 0.1 * (-3) = 1.3;  0 - 0.5 - 0.1 * 0 = -0.5.
    scored = [scored_group([0.75, 1.0], [0.5, 0.0]), scored_group([None, 0.0], [0.5, 0.5])]
    rewards = total_rewards(scored, kl=[[2.0, -3.0], [9.0, 0.0]], kl_coef=0.1)
    expected = torch.tensor([[0.05, 1.3], [math.nan, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, equal_nan=True)


def test_without_a_coefficient_no_kl_is_asked_for():
    assert total_rewards([scored_group([1.0, 0.0])], kl=[], kl_coef=0.0).tolist() == [[1.0, 0.0]]


def test_rollouts_without_a_reward_leave_and_the_others_are_compared_without_them():
    # Of 1 and 0 alone the advantages are +-1/sqrt 2 (test_grpo); rollout 1 is gone from the rows.
    scored = [scored_group([1.0, None, 0.0])]
    batch = make_batch(scored, total_rewards(scored, [], 0.0), LearnerConfig())
    assert [row.token_ids for row in batch.rows] == [(10, 1), (12, 1)]
    assert [row.logprobs for row in batch.rows] == [(0.0, -0.5), (-2.0, -0.5)]
    assert [row.prompt_token_ids for row in batch.rows] == [(7, 8)] * 2
    assert [row.advantage for row in batch.rows] == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


def test_advantages_are_made_of_the_total_and_scaled_as_asked():
    # Rewards are equal, the KL is not: 1 - 0.5 * 0.2 and 1 - 0.5 * 0.6, centred +0.1 and -0.1.
    scored = [scored_group([1.0, 1.0])]
    total = total_rewards(scored, [[0.2, 0.6]], 0.5)
    batch = make_batch(scored, total, LearnerConfig(advantage_scale="none"))
    assert [row.advantage for row in batch.rows] == pytest.approx([0.1, -0.1])


def test_rows_with_signal_are_those_of_groups_that_differ():
    scored = [scored_group([1.0, 1.0]), scored_group([1.0, 0.0]), scored_group([None, 1.0])]
    batch = make_batch(scored, total_rewards(scored, [], 0.0), LearnerConfig())
    assert len(batch.rows) == 5  # a dropped rollout is no row; one without signal is, and counts in the mean
    assert [row.token_ids for row in batch.with_signal] == [(10, 1), (11, 1)]
    assert Batch(()).with_signal == ()
