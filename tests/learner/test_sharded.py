"""Two Ray actors with a shard each, against one process."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from cat_grpo.config import LearnerConfig, ModelConfig
from cat_grpo.engines.hf import load_model_and_tokenizer
from cat_grpo.errors import BadInput
from cat_grpo.learner.batches import Batch, TrainingRow, micro_batches
from cat_grpo.learner.learner import Learner, NotFiniteError
from cat_grpo.models import model_folder

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's, which are many

SETTINGS = {"learning_rate": 1e-4, "weight_decay": 0.1, "micro_batch_tokens": 64}
"""With the learning rate of the lab's presets."""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)  # room for two pairs at a time
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(local_ray: None) -> Iterator["Pair"]:
    """For all tests: a rank takes long to start. A test takes up the weights where the last one left them."""
    pair = Pair()
    yield pair
    pair.two.close()


def lab():
    return load_model_and_tokenizer(ModelConfig(path="lab"), torch.float32)[0]


def ranks(num_ranks: int = 2, **settings):
    from cat_grpo.learner.sharded import Ranks

    config = LearnerConfig(num_ranks=num_ranks, **SETTINGS, **settings)
    return Ranks(lab(), model_folder("lab"), config, temperature=1.0)


def batch(seed: int) -> Batch:
    """Groups of four; three or more micro-batches, so that the ranks' shares are unequal."""
    rng = random.Random(seed)
    rows = []
    for i in range(12):
        if i % 4 == 0:
            prompt = tuple(rng.choices(range(10, 200), k=6))
        ids = tuple(rng.choices(range(10, 200), k=rng.randint(2, 20)))
        rows.append(TrainingRow(prompt, ids, (-1.0,) * len(ids), rng.choice([-1.0, 1.0]), 1 / 12 / len(ids)))
    return Batch(tuple(rows))


class Pair:
    """One process and two ranks that are given the same batches."""

    def __init__(self, **settings) -> None:
        self.one = Learner(lab(), LearnerConfig(**SETTINGS, **settings), 1.0)
        self.two = ranks(**settings)

    def update(self, seed: int) -> list[dict[str, float]]:
        return [learner.update(batch(seed)) for learner in (self.one, self.two)]


def weights_of(learner) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in learner.model.state_dict().items()}


def end_alike(pair: Pair) -> None:
    before = weights_of(pair.one)
    for step in range(3):
        alone, together = pair.update(step)
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    weights = weights_of(pair.one)
    for name, weight in weights_of(pair.two).items():
        assert_close(weight, weights[name], atol=1e-6, rtol=0, msg=name)
    assert max((weights[name] - before[name]).abs().max().item() for name in before) > 1e-4


def test_two_ranks_end_where_one_process_does(pair: Pair):
    end_alike(pair)


def test_so_they_do_with_two_updates_of_gspo_and_checkpointing(local_ray: None):
    other = Pair(updates_per_step=2, ratio="sequence", gradient_checkpointing="on")
    with closing(other.two):  # its room is wanted again, even after a failure
        end_alike(other)


def test_killed_and_resumed_the_ranks_end_alike(pair: Pair, tmp_path: Path):
    for step in range(2):
        pair.update(step)
    pair.two.save(tmp_path)
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(weight, pair.two.model.state_dict()[name]), name
    pair.update(2)
    resumed = ranks()
    resumed.restore(tmp_path)
    resumed.update(batch(2))
    resumed.close()
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, pair.two.model.state_dict()[name]), name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [600, 100_000])
def test_micro_batches_leave_hardly_a_rank_idle(num_ranks: int, max_tokens: int):
    """The share of the tokens computed, a round as long as its largest, that are trained on."""
    from cat_grpo.learner.sharded import even_size

    rng = random.Random(0)
    lengths = [round(rng.lognormvariate(4, 0.5)) + 1 for _ in range(128)]
    rows = [TrainingRow((i // 8,) * 30, (1,) * n, (0.0,) * n, 1.0, 1.0) for i, n in enumerate(lengths)]
    sizes = [b.input_ids.numel() for b in micro_batches(rows, even_size(rows, max_tokens, num_ranks))]
    assert max(sizes) <= max_tokens
    rounds = -(-len(sizes) // num_ranks)
    computed = sum(max(sizes[i * num_ranks : (i + 1) * num_ranks]) for i in range(rounds)) * num_ranks
    assert sum(sizes) / computed > 0.8


def test_more_ranks_than_ray_has_room_for_are_refused(local_ray: None):
    with pytest.raises(BadInput, match=r"learner.num_ranks: needs 5 CPUs, and Ray has 4"):
        ranks(5)


def test_what_is_not_finite_on_one_rank_stops_them_all(pair: Pair):
    before = weights_of(pair.two)
    poison = TrainingRow((1,), (2,), (0.0,), float("nan"), 0.1)
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        pair.two.update(Batch((*batch(0).rows, poison)))
    pair.update(1)  # no rank waits for another
    alone = weights_of(pair.one)
    for name, weight in weights_of(pair.two).items():
        # A tenth of what AdamW's first step moves, whatever small gradient it has: rounding is seen in it.
        assert_close(weight, alone[name], atol=1e-5, rtol=0, msg=name)
        assert not torch.equal(weight, before[name]) or "norm" in name
