"""Sends the learner's weights to an engine that has its own, and checks that they have arrived."""

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
"""Mean gap of a sequence's logprobs, in nats, for float32 and bfloat16: more than their kernels differ by."""
RAM = Path("/dev/shm")
"""Where Linux keeps files in memory."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed sequence whose logprobs the learner and the engine both return."""

    name: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


async def send_weights(model: PreTrainedModel, engine: Engine, dtype: torch.dtype, folder: Path) -> None:
    """Makes the engine serve the model's trained weights.

    Adapters go through `folder` and stay there for servers that are restarted. Without adapters, the weights
    go through memory in `dtype`, the engine's, and replace the engine's own.
    """
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
    """The largest mean gap between learner and engine on a probe, in nats.

    SyncError when they do not serve the same weights. It names the first probe beyond `tolerance`.
    """
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
    """Makes a probe of each named prompt's ids: the logprobs of its second half, given its first."""
    return [Probe(name, tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 :])) for name, ids in prompts]


def _save_adapters(model: Any, folder: Path) -> None:
    with whole(folder) as temporary:
        model.save_pretrained(temporary)


def _memory(model: PreTrainedModel, dtype: torch.dtype) -> Path | None:
    """The folder in memory if the weights fit there; otherwise None, the default for temporary files."""
    needed = model.num_parameters() * dtype.itemsize
    return RAM if RAM.is_dir() and shutil.disk_usage(RAM).free > 1.1 * needed else None
