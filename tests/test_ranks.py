"""Two Ray actors with a shard each, against one process."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from cat_grpo.batches import Batch, TrainingRow, micro_batches
from cat_grpo.config import LearnerConfig, ModelConfig
from cat_grpo.engines.hf import load_model_and_tokenizer
from cat_grpo.engines.tokens import model_folder
from cat_grpo.learner import Learner, NotFiniteError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's, which are many

SETTINGS = {"learning_rate": 1e-4, "weight_decay": 0.1, "micro_batch_tokens": 64}
"""With the learning rate of the lab's presets."""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def lab():
    return load_model_and_tokenizer(ModelConfig(path="lab"), torch.float32)[0]


def ranks(num_ranks: int = 2, **settings):
    from cat_grpo.ranks import Ranks

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


@pytest.mark.parametrize(
    "settings",
    [{}, {"updates_per_step": 2, "ratio": "sequence", "gradient_checkpointing": "on"}],
    ids=["GRPO", "GSPO, two updates, checkpointed"],
)
def test_two_ranks_end_where_one_process_does(local_ray: None, settings: dict):
    one = Learner(lab(), LearnerConfig(**SETTINGS, **settings), 1.0)
    two = ranks(**settings)
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    for step in range(3):
        alone, together = one.update(batch(step)), two.update(batch(step))
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    two.close()
    weights = one.model.state_dict()
    for name, weight in two.model.state_dict().items():
        assert_close(weight, weights[name], atol=1e-6, rtol=0, msg=name)
    assert max((weights[name] - before[name]).abs().max().item() for name in before) > 1e-4


def test_killed_and_resumed_the_ranks_end_alike(local_ray: None, tmp_path: Path):
    steady = ranks()
    for step in range(2):
        steady.update(batch(step))
    steady.save(tmp_path)
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(weight, steady.model.state_dict()[name]), name
    steady.update(batch(2))
    steady.close()
    resumed = ranks()
    resumed.restore(tmp_path)
    resumed.update(batch(2))
    resumed.close()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, steady.model.state_dict()[name]), name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [600, 100_000])
def test_micro_batches_leave_hardly_a_rank_idle(num_ranks: int, max_tokens: int):
    """The share of the tokens computed, a round as long as its largest, that are trained on."""
    from cat_grpo.ranks import even_size

    rng = random.Random(0)
    lengths = [round(rng.lognormvariate(4, 0.5)) + 1 for _ in range(128)]
    rows = [TrainingRow((i // 8,) * 30, (1,) * n, (0.0,) * n, 1.0, 1.0) for i, n in enumerate(lengths)]
    sizes = [b.input_ids.numel() for b in micro_batches(rows, even_size(rows, max_tokens, num_ranks))]
    assert max(sizes) <= max_tokens
    rounds = -(-len(sizes) // num_ranks)
    computed = sum(max(sizes[i * num_ranks : (i + 1) * num_ranks]) for i in range(rounds)) * num_ranks
    assert sum(sizes) / computed > 0.8


def test_more_ranks_than_ray_has_room_for_are_refused(local_ray: None):
    with pytest.raises(ValueError, match=r"learner.num_ranks: needs 3 CPUs, and Ray has 2"):
        ranks(3)


def test_what_is_not_finite_on_one_rank_stops_them_all(local_ray: None):
    learner = ranks()
    weights = {name: weight.clone() for name, weight in learner.model.state_dict().items()}
    rows = batch(0).rows
    poison = TrainingRow((1,), (2,), (0.0,), float("nan"), 0.1)
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        learner.update(Batch((*rows, poison)))
    learner.update(batch(1))  # no rank waits for another
    learner.close()
    alone = Learner(lab(), LearnerConfig(**SETTINGS), 1.0)
    alone.update(batch(1))
    for name, weight in learner.model.state_dict().items():
        # A tenth of what AdamW's first step moves, whatever small gradient it has: rounding is seen in it.
        assert_close(weight, alone.model.state_dict()[name], atol=1e-5, rtol=0, msg=name)
        assert not torch.equal(weight, weights[name]) or "norm" in name
