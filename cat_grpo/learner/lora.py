"""LoRA (arXiv:2106.09685) through peft: small trained matrices beside frozen ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cat_grpo.errors import BadInput

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""A checkpoint with this file holds only the adapters, and names the model that they belong to."""


def add_adapters(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Freezes the model and gives every linear layer but the head an adapter, in float32.

    The adapters change nothing until they are trained. BadInput when peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise BadInput("learner.lora_rank needs peft: pip install -e '.[lora]' in a checkout") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model.add_adapter(config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def has_adapters(model: PreTrainedModel) -> bool:
    """Returns whether the model came from a folder with adapters or was given some later."""
    return getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Turns the model's adapters off inside the `with` block."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def load_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    """Loads the checkpoint's adapters into those that the model has, bit for bit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER_WEIGHTS))


def load_merged(checkpoint: Path, dtype: str) -> PreTrainedModel:
    """The checkpoint's model, with its adapters, if it has any, added to the weights."""
    if not (checkpoint / ADAPTER_WEIGHTS).exists():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    from peft import AutoPeftModelForCausalLM

    merged: Any = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return merged.merge_and_unload().to(getattr(torch, dtype))
