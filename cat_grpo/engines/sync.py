"""From the learner to an engine with weights of its own, and the proof that they have arrived."""

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cat_grpo.engines import Engine, SyncError
from cat_grpo.files import whole
from cat_grpo.learner.lora import has_adapters

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
"""Mean gap of a sequence's logprobs, in nats, above what float32 and bfloat16 kernels differ by."""
RAM = Path("/dev/shm")
"""Where Linux keeps files in memory."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed sequence that both are asked for."""

    name: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


async def send_weights(model: PreTrainedModel, engine: Engine, dtype: torch.dtype, folder: Path) -> None:
    """The engine serves what the model has been trained to: adapters by way of `folder`, where they stay for
    servers that start anew, weights by way of memory, in the engine's dtype, into those that it has."""
    if has_adapters(model):
        await asyncio.to_thread(_save_adapters, model, folder)
        await engine.load_weights(folder)
        return
    with tempfile.TemporaryDirectory(prefix="cat-grpo-", dir=_memory(model, dtype)) as temporary:
        weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
        await asyncio.to_thread(model.save_pretrained, temporary, state_dict=weights)
        del weights
        await engine.load_weights(Path(temporary))


async def check_sync(learner: Engine, engine: Engine, probes: Sequence[Probe], tolerance: float) -> float:
    """The largest mean gap between the two on a probe, in nats. SyncError, with the first probe beyond
    `tolerance` by name, where they do not serve the same weights."""
    asked = [probe.prompt_token_ids for probe in probes], [probe.token_ids for probe in probes]
    ours, theirs = await learner.logprobs(*asked), await engine.logprobs(*asked)
    gaps = [
        sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
        for one, other in zip(ours, theirs, strict=True)
    ]
    for probe, gap in zip(probes, gaps, strict=True):
        if not gap <= tolerance:
            raise SyncError(
                f"the policy's engine does not have the learner's weights: on {probe.name} their logprobs are"
                f" {gap:.2g} nats apart on average, beyond {tolerance:g}"
            )
    return max(gaps)


def make_probes(prompts: Sequence[tuple[str, Sequence[int]]]) -> list[Probe]:
    """Of named prompts in ids: the engine gives the logprobs of their second half, after their first."""
    return [Probe(name, tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 :])) for name, ids in prompts]


def _save_adapters(model: Any, folder: Path) -> None:
    with whole(folder) as temporary:
        model.save_pretrained(temporary)


def _memory(model: PreTrainedModel, dtype: torch.dtype) -> Path | None:
    """A folder in memory, where there is room for the weights; else None, for the temporary files' own."""
    needed = model.num_parameters() * dtype.itemsize
    return RAM if RAM.is_dir() and shutil.disk_usage(RAM).free > 1.1 * needed else None
