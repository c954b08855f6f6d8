"""Gradient checkpointing: makes a forward pass keep less for its backward pass, and measures how much."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cat_grpo.errors import BadInput

OPTIMIZER_BYTES = 12
"""Bytes per trained weight: its gradient and AdamW's two moments, in float32."""


@contextmanager
def layer_inputs_only(model: PreTrainedModel) -> Iterator[None]:
    """Keeps only the layers' inputs inside the `with` block, and computes the rest again when it is needed.

    transformers' own switch would put the layers into training mode. That turns dropout on and, in an engine
    that shares the model, turns the cache off. BadInput for a model without such layers.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"model of type {model.config.model_type}: has no layers for gradient checkpointing")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def kept_bytes(model: PreTrainedModel, forward: Callable[[], object]) -> int:
    """The bytes of the tensors that `forward` keeps for its backward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = forward()  # keeps the tensors alive until they are counted
    del output
    return sum(kept.values())


def free_cached_memory() -> None:
    """Frees the GPU memory that torch only keeps for later, so that other processes can use it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """The bytes that new tensors could use: a GPU's free memory, or half of the machine's memory on a CPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
