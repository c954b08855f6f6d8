"""What a backward pass keeps of its forward pass, and how to keep less: gradient checkpointing."""

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
"""A trained weight's gradient and AdamW's two moments, in float32."""


@contextmanager
def layer_inputs_only(model: PreTrainedModel) -> Iterator[None]:
    """For as long as this lasts only the layers' inputs are kept, and the rest computed again when needed.

    transformers' own switch would put the layers into training mode, which turns dropout on and, in an
    engine that shares the model, the cache off. BadInput for a model without such layers.
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
    """The memory of the tensors that `forward` keeps for its backward pass, the weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = forward()  # holds what is kept until it is counted
    del output
    return sum(kept.values())


def free_cached_memory() -> None:
    """Gives a GPU's memory that torch only keeps for later back, for other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could have: of a GPU what is free, of a CPU half of what the machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
