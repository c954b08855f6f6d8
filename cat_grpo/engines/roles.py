"""Opens a config's engines and gives each role its engine."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import torch

from cat_grpo.config import Config, ModelConfig
from cat_grpo.engines import Engine, Engines
from cat_grpo.engines.hf import HFEngine, resolve_device, unloaded_model
from cat_grpo.engines.memory import GIB, HALF, TRAINED, engine_share
from cat_grpo.errors import BadInput
from cat_grpo.models import model_folder

log = logging.getLogger(__name__)

Secrets = Mapping[str, str]
"""The API key behind each `prefect:NAME`. The flows read them, because only they know Prefect."""


def open_engine(
    config: ModelConfig, secrets: Secrets, gpu_memory: float | None = None, lora_rank: int = 0
) -> Engine:
    """The engine that the config names, with the model's own weights. BadInput for what it cannot serve."""
    if config.engine == "vllm":
        from cat_grpo.engines.vllm import VLLMEngine

        return VLLMEngine.open(config, gpu_memory, lora_rank)
    if config.engine == "openai":
        from cat_grpo.engines.openai import open_servers

        return open_servers(config, _api_key(config.server.api_key, secrets))
    return HFEngine.open(config)


async def open_engines(models: Sequence[ModelConfig], secrets: Secrets) -> list[Engine]:
    """One engine per model, in order. Equal models share one engine."""
    named = [model.model_copy(update={"path": model_folder(model.path)}) for model in models]
    distinct = [model for i, model in enumerate(named) if model not in named[:i]]
    opened = await _open_all([(model, 0) for model in distinct], secrets)
    return [opened[distinct.index(model)] for model in named]


async def open_roles(config: Config, live: HFEngine, secrets: Secrets) -> Engines:
    """The engines of a training run. `live` answers with the learner's live module.

    With engine hf, `live` is the policy. With adapters, and unless the config names an anchor, the anchor is
    the policy's engine without them.
    """
    lora_rank = config.learner.lora_rank
    policies = [] if config.model.engine == "hf" else [(config.model, lora_rank)]
    anchor = config.anchor or (None if lora_rank else config.model)
    others = [(model, 0) for model in (anchor, config.judge) if model]
    learner = live.model.num_parameters() * (HALF if lora_rank else TRAINED) // config.learner.num_ranks
    opened = iter(await _open_all([*policies, *others], secrets, learner))
    policy = next(opened) if policies else live
    frozen = next(opened) if anchor else policy.without_adapters()
    return Engines(policy, frozen, next(opened) if config.judge else frozen)


async def _open_all(
    wanted: Sequence[tuple[ModelConfig, int]], secrets: Secrets, learner: int = 0
) -> list[Engine]:
    """Opens an engine for each model and adapter rank, or none if one fails. `learner`: its bytes."""
    share = _gpu_share([model for model, _ in wanted], learner)
    opened: list[Engine] = []
    async with AsyncExitStack() as undo:
        for model, lora_rank in wanted:
            opened.append(open_engine(model, secrets, share, lora_rank))
            undo.push_async_callback(opened[-1].close)
        undo.pop_all()
    return opened


def refuse_untrainable(config: Config) -> None:
    """Raises BadInput when the policy's engine cannot be trained, or the anchor cannot give the KL."""
    if config.model.engine == "openai":
        if config.model.is_chat:
            raise BadInput("model.server.api: the policy needs its token ids back; set it to tokens")
        if not config.learner.lora_rank:
            raise BadInput("learner.lora_rank: servers take new adapters, not new weights; set it above 0")
    anchor = config.anchor or config.model
    if config.learner.kl_coef and anchor.is_chat:
        raise BadInput("learner.kl_coef: a chat server cannot read the policy's tokens; set it to 0")


def _api_key(where: str, secrets: Secrets) -> str:
    """The API key that `where` names. If empty, a placeholder, because the client would look for its own."""
    kind, _, name = where.partition(":")
    if not where:
        return "none"
    if kind == "env" and os.environ.get(name):
        return os.environ[name]
    if where in secrets:
        return secrets[where]
    what = "variable in the environment" if kind == "env" else "Secret block available here"
    raise BadInput(f"server.api_key: {where}: there is no such {what}")


def _gpu_share(models: Sequence[ModelConfig], learner: int) -> float | None:
    """The share of the GPU for each vLLM engine that names none, sized for the largest of them.

    None without a GPU or without such an engine.
    """
    served = [model for model in models if model.engine == "vllm" and not model.vllm.gpu_memory]
    if not served or resolve_device(served[0]).type != "cuda":
        return None
    beside = sum(
        HALF * unloaded_model(model.path).num_parameters() for model in models if model.engine == "hf"
    )
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    num_weights = max(unloaded_model(model.path).num_parameters() for model in served)
    share = engine_share(num_weights, gpu_bytes, len(served), learner + beside)
    log.info("vLLM: %d engines, each with %.0f%% of %.0f GiB", len(served), 100 * share, gpu_bytes / GIB)
    return share
