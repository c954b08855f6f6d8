"""Who plays which role: a config's engines, opened."""

import logging
import os
from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cat_grpo.config import Config, ModelConfig
from cat_grpo.engines import Engine, Engines
from cat_grpo.engines.hf import HFEngine, resolve_device
from cat_grpo.engines.memory import GIB, HALF, TRAINED, engine_share
from cat_grpo.engines.tokens import model_folder

log = logging.getLogger(__name__)

Secrets = Mapping[str, str]
"""What `prefect:NAME` stands for, read by those who know Prefect."""


def open_engine(
    config: ModelConfig, secrets: Secrets, gpu_memory: float | None = None, lora_rank: int = 0
) -> Engine:
    """The engine that the config names, with the model's own weights. ValueError for what it cannot serve."""
    if config.engine == "vllm":
        from cat_grpo.engines.vllm import VLLMEngine

        return VLLMEngine.open(config, gpu_memory, lora_rank)
    if config.engine == "openai":
        from cat_grpo.engines.openai import open_servers

        return open_servers(config, _api_key(config.server.api_key, secrets))
    return HFEngine.open(config)


async def open_roles(config: Config, live: HFEngine, secrets: Secrets) -> Engines:
    """The roles of a training run, whose learner's live module is what `live` answers with.

    Under transformers, that is the policy. With adapters the anchor is the policy's engine without them.
    """
    lora_rank, share = config.learner.lora_rank, _gpu_share(config)
    opened: list[Engine] = []

    def opens(model: ModelConfig, rank: int = 0) -> Engine:
        opened.append(open_engine(model, secrets, share, rank))
        return opened[-1]

    try:
        policy = live if config.model.engine == "hf" else opens(config.model, lora_rank)
        if config.anchor:
            anchor = opens(config.anchor)
        else:
            anchor = policy.without_adapters() if lora_rank else opens(config.model)
        return Engines(policy, anchor, opens(config.judge) if config.judge else anchor)
    except BaseException:
        for engine in opened:
            await engine.close()
        raise


def refuse_untrainable(config: Config) -> None:
    """ValueError where the policy's engine cannot be given what the learner makes."""
    if config.model.engine == "openai":
        if config.model.server.api == "chat":
            raise ValueError("model.server.api: the policy needs its token ids back: tokens")
        if not config.learner.lora_rank:
            raise ValueError("learner.lora_rank: servers take new adapters, not new weights: above 0")
    anchor = config.anchor or config.model
    if config.learner.kl_coef and anchor.engine == "openai" and anchor.server.api == "chat":
        raise ValueError("learner.kl_coef: a chat server cannot score the policy's tokens: 0")


def _api_key(where: str, secrets: Secrets) -> str:
    """Of no server that asks for one, a word that stands for none: the client would look for its own."""
    kind, _, name = where.partition(":")
    if not where:
        return "none"
    if kind == "env" and name in os.environ:
        return os.environ[name]
    if where in secrets:
        return secrets[where]
    what = "variable in the environment" if kind == "env" else "Secret block to be had here"
    raise ValueError(f"server.api_key: {where}: there is no such {what}")


def _gpu_share(config: Config) -> float | None:
    """Of each vLLM engine of the run, by the size of the largest; None without a GPU, or without any."""
    anchor = config.anchor or (None if config.learner.lora_rank else config.model)
    served = [model for model in (config.model, anchor, config.judge) if model and model.engine == "vllm"]
    if not served or resolve_device(config.model).type != "cuda":
        return None
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    num_weights = max(_num_weights(model) for model in served)
    learner = HALF if config.learner.lora_rank else TRAINED // config.learner.num_ranks
    share = engine_share(num_weights, gpu_bytes, len(served), learner)
    log.info("vLLM: %d engines, each with %.0f%% of %.0f GiB", len(served), 100 * share, gpu_bytes / GIB)
    return share


def _num_weights(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder(config.path)))
    return model.num_parameters()
