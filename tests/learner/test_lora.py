"""Adapters: what trains, what stays, and that the anchor is the policy without them."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from cat_grpo.config import LearnerConfig, ModelConfig
from cat_grpo.engines import Sampling
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer
from cat_grpo.errors import BadInput
from cat_grpo.learner.batches import Batch, TrainingRow
from cat_grpo.learner.learner import Learner
from cat_grpo.learner.lora import add_adapters
from cat_grpo.run.checkpoints import Checkpoints, export_model
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.train import train_on
from cat_grpo.settings import load_config

LAB = ModelConfig(path="lab")
PROMPT = [{"role": "user", "content": "Work out 12 + 30."}]
ROWS = (
    TrainingRow((5, 6, 7), (8, 9), (0.0, 0.0), 1.0, 0.5),
    TrainingRow((5, 6, 7), (10, 11), (0.0, 0.0), -1.0, 0.5),
)


def policy(dtype: torch.dtype = torch.float32, seed: int = 0):
    model, tokenizer = load_model_and_tokenizer(LAB, dtype)
    add_adapters(model, rank=4, alpha=8, seed=seed)
    return model, tokenizer


def trained(dtype: torch.dtype = torch.float32) -> tuple[Learner, object]:
    model, tokenizer = policy(dtype)
    learner = Learner(model, LearnerConfig(learning_rate=1e-2), 1.0, dtype)
    for _ in range(3):
        learner.update(Batch(ROWS))
    return learner, tokenizer


@contextmanager
def stepped() -> Iterator[set[int]]:
    """How many weights each optimizer that makes a step moves."""
    sizes: set[int] = set()

    def count(optimizer: torch.optim.Optimizer, *_) -> None:
        sizes.add(sum(weight.numel() for group in optimizer.param_groups for weight in group["params"]))

    handle = register_optimizer_step_pre_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapters_are_trained_and_in_float32(dtype):
    before = {name: weight.clone() for name, weight in policy(dtype)[0].named_parameters()}
    with stepped() as sizes:
        learner, _ = trained(dtype)
    for name, weight in learner.model.named_parameters():
        is_adapter = "lora_" in name
        assert torch.equal(weight, before[name]) is not is_adapter, name
        assert weight.dtype == (torch.float32 if is_adapter else dtype)
    (size,) = sizes
    assert size < 0.1 * sum(w.numel() for w in before.values())


def test_the_head_is_not_adapted():
    assert not any("lora_" in name for name, _ in policy()[0].lm_head.named_parameters())


async def test_the_anchor_is_the_policy_without_its_adapters():
    learner, tokenizer = trained()
    trained_policy = HFEngine(learner.model, tokenizer, LAB)
    anchor, untouched = trained_policy.without_adapters(), HFEngine.open(LAB)
    prompts, completions = [(5, 6, 7)] * 2, [(8, 9), (10, 11)]
    # Both at once: the calls to one module must not meet.
    ours, plain, policys = await asyncio.gather(
        anchor.logprobs(prompts, completions),
        untouched.logprobs(prompts, completions),
        trained_policy.logprobs(prompts, completions),
    )
    for ours_of, plain_of in zip(ours, plain, strict=True):
        assert ours_of == pytest.approx(plain_of, abs=1e-4)
    assert policys[0][0] > plain[0][0] + 0.1
    greedy = Sampling(max_tokens=8, temperature=0.0)
    assert await anchor.generate([PROMPT], greedy) == await untouched.generate([PROMPT], greedy)
    assert all(w.requires_grad for n, w in learner.model.named_parameters() if "lora_" in n)
    await untouched.close()
    await trained_policy.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_holds_the_adapters_and_brings_them_back_bit_for_bit(tmp_path: Path, dtype):
    learner, tokenizer = trained(dtype)
    folder = Checkpoints(tmp_path).save(3, learner, tokenizer, {}, best=True)
    assert not list(folder.glob("model*.safetensors"))
    other = Learner(policy(dtype, seed=1)[0], LearnerConfig(learning_rate=1e-2), 1.0, dtype)
    Checkpoints(tmp_path).restore(other)
    for side in (learner, other):
        side.update(Batch(ROWS))
    ours, theirs = learner.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_is_the_whole_model(tmp_path: Path):
    learner, tokenizer = trained()
    folder = Checkpoints(tmp_path).save(3, learner, tokenizer, {}, best=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = learner.model(ids).logits
    out = export_model(folder, tmp_path / "out", "float32")
    assert (out / "model.safetensors").exists() and not (out / "adapter_config.json").exists()
    for path in (out, folder):  # both load as any model does
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=0)


async def test_adapters_are_no_model_to_start_from(tmp_path: Path):
    learner, tokenizer = trained()
    folder = Checkpoints(tmp_path).save(3, learner, tokenizer, {}, best=True)
    config = load_config("lab-verifiable", None, [f"model.path={folder}"])
    with pytest.raises(BadInput, match="has only adapters: cat-grpo export merges them"):
        async with open_loop(config, tmp_path / "run"):
            pass


async def test_a_step_trains_adapters_against_one_copy_of_the_weights(tmp_path: Path):
    overrides = ["learner.lora_rank=4", "learner.learning_rate=1e-2", "learner.kl_coef=0.01"]
    config = load_config("lab-verifiable", None, [*overrides, "train.problems_per_step=4", "train.steps=2"])
    async with open_loop(config, tmp_path / "run") as loop:
        assert loop.engines.anchor.model is loop.engines.policy.model is loop.learner.model
        await train_on(loop, Observer(), time.monotonic())
    metrics = loop.history
    assert len(metrics) == 2
    assert metrics[0]["policy/kl"] == 0.0  # the first step's policy is the anchor
    assert metrics[1]["policy/kl"] != 0.0
    assert metrics[0]["policy/grad_norm"] > 0
    engine = HFEngine.open(ModelConfig(path=str(tmp_path / "run" / "checkpoints" / "latest")))
    (mine,) = await engine.logprobs([(5, 6, 7)], [(8, 9)])
    live_engine = HFEngine(loop.learner.model, loop.tokenizer, LAB)
    (live,) = await live_engine.logprobs([(5, 6, 7)], [(8, 9)])
    await live_engine.close()
    assert mine == pytest.approx(live, abs=1e-5)
    await engine.close()
