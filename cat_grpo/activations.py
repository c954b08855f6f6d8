"""What a backward pass keeps of its forward pass, and how to keep less: gradient checkpointing."""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

OPTIMIZER_BYTES = 12
"""A trained weight's gradient and AdamW's two moments, in float32."""


def keep_layer_inputs_only(model: PreTrainedModel) -> None:
    """The rest of a layer is computed again in the backward pass. Dropout stays as it is: off."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of the layer alone, which asks for it; its parts do not see it


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


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could have: of a GPU what is free, of a CPU half of what the machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
