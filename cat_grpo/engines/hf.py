"""The engine that runs transformers in this process, on a CPU or a GPU. It needs nothing else.

It can share the learner's live module. It then serves every update without a copy.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cat_grpo.config import ModelConfig
from cat_grpo.engines import Sampling
from cat_grpo.engines.tokens import ChatTokens, end_of_turn_ids, load_tokenizer, readable_model
from cat_grpo.learner.lm_head import head_logprobs
from cat_grpo.learner.lora import adapters_off
from cat_grpo.models import model_folder
from cat_grpo.records import Completion, Generation, LabelRead, Messages, Usage

T = TypeVar("T")


def resolve_device(config: ModelConfig) -> torch.device:
    name = config.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if resolve_device(config).type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def load_model_and_tokenizer(
    config: ModelConfig, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode on its device, in `dtype` or the config's, and its tokenizer.

    BadInput when either cannot be read or the tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(config.path)
    with readable_model(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(config.path), dtype=dtype or resolve_dtype(config)
        )
    torch.nn.Module.to(model, resolve_device(config))
    return model.eval(), tokenizer


def unloaded_model(path: str) -> PreTrainedModel:
    """The model's layers and sizes, without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder(path)))


class HFEngine:
    """One model and its tokenizer. Calls queue up. Each runs to its end in a thread, off the event loop."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig
    ) -> None:
        self.model: Any = model  # transformers' types do not say that it can generate
        self._pad_id: Any = tokenizer.pad_token_id
        self._config = config
        declared = model.generation_config.eos_token_id if model.generation_config else None
        self.tokens = ChatTokens(tokenizer, end_of_turn_ids(declared), config.chat_template_kwargs)
        # One thread for all calls: a pool would give each of its threads an OpenMP team of its own.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-engine")
        self._set_up: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def open(cls, config: ModelConfig) -> "HFEngine":
        return cls(*load_model_and_tokenizer(config), config)

    def without_adapters(self) -> "HFEngine":
        """Returns this engine with the adapters off. Both share the weights and one queue of calls."""
        other = copy(self)
        other._set_up = partial(adapters_off, self.model)
        return other

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        return await self._run(lambda: self._generate(prompts, sampling))

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        return await self._run(lambda: self._read_labels(prompts, labels))

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return await self._run(lambda: self._logprobs(prompts, completions))

    async def load_weights(self, checkpoint: Path) -> None:
        await self._run(lambda: self._load_weights(checkpoint))

    async def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._without_gradients, work)

    def _without_gradients(self, work: Callable[[], T]) -> T:
        """Runs `work` without gradients, in the engine's dtype even on the learner's float32 weights."""
        dtype = resolve_dtype(self._config)
        is_lower = dtype != torch.float32
        autocast = torch.autocast(self.model.device.type, dtype, enabled=is_lower)
        with torch.inference_mode(), autocast, self._set_up():
            return work()

    def _load_weights(self, checkpoint: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())

    def _generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        ids = [self.tokens.encode(messages) for messages in prompts]
        seeds = sampling.seeds or [int(torch.randint(2**62, ())) for _ in prompts]
        completions: dict[int, tuple[Completion, ...]] = {}
        for batch in self._batches([len(row) for row in ids], sampling.max_tokens, sampling.n):
            streams = [_stream(seeds[i], j) for i in batch for j in range(sampling.n)]
            sampler = _Sampler(sampling, streams)
            rows = [ids[i] for i in batch for _ in range(sampling.n)]
            made = self._decode(rows, sampling.max_tokens, sampler)
            for position, i in enumerate(batch):
                completions[i] = tuple(made[position * sampling.n : (position + 1) * sampling.n])
        return [Generation.counted(row, completions[i]) for i, row in enumerate(ids)]

    def _decode(
        self, rows: Sequence[Sequence[int]], max_tokens: int, sampler: "_Sampler"
    ) -> list[Completion]:
        input_ids, attention_mask = self._left_padded(rows)
        generation_config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,  # the sampler leaves one token to choose from
            eos_token_id=self.tokens.end_ids,
            pad_token_id=self._pad_id,
        )
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([sampler]),
        )
        token_ids = output[:, input_ids.shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        return [self.tokens.completion(*row) for row in zip(token_ids, logprobs, strict=True)]

    def _read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        label_ids = self.tokens.label_ids(labels)
        ids = [self.tokens.encode(messages) for messages in prompts]
        reads: dict[int, LabelRead] = {}
        for batch in self._batches([len(row) for row in ids], 0, 1):
            input_ids, attention_mask = self._left_padded([ids[i] for i in batch])
            output = self.model(**_inputs(input_ids, attention_mask), logits_to_keep=1)
            logits = output.logits[:, -1].float()  # (B, V)
            probabilities = logits.softmax(-1)
            per_label = torch.stack([probabilities[:, ids].sum(-1) for ids in label_ids], dim=1).tolist()
            for i, row in zip(batch, per_label, strict=True):
                reads[i] = LabelRead(tuple(row), Usage(len(ids[i])))
        return [reads[i] for i in range(len(prompts))]

    def _logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        read: dict[int, tuple[float, ...]] = {}
        for batch in self._batches([len(row) for row in rows], 0, 1):
            input_ids, attention_mask = self._left_padded([rows[i] for i in batch])
            longest = max(len(completions[i]) for i in batch)
            hidden = self.model.get_decoder()(**_inputs(input_ids, attention_mask)).last_hidden_state
            tokens = input_ids[:, input_ids.shape[1] - longest :]
            # In tiles, because all positions x vocabulary would be tens of gigabytes.
            logprobs = head_logprobs(
                hidden[:, -longest - 1 : -1].flatten(0, 1),
                self.model.get_output_embeddings().weight,
                tokens.flatten(),
            )
            for i, row in zip(batch, logprobs.view_as(tokens).tolist(), strict=True):
                read[i] = tuple(row[longest - len(completions[i]) :])
        return [read[i] for i in range(len(rows))]

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        pad = self._pad_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return input_ids.to(self.model.device), attention_mask.to(self.model.device)

    def _batches(self, lengths: Sequence[int], max_tokens: int, n: int) -> Iterator[list[int]]:
        """Yields batches of indices, longest first. Only a batch of one index may exceed `max_batch_tokens`,
        padding included."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            width = (lengths[batch[0]] if batch else lengths[i]) + max_tokens
            if batch and (len(batch) + 1) * n * width > self._config.max_batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The arguments of a forward pass over left-padded rows."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "use_cache": False,
    }


class _Sampler:
    """A logits processor that draws each row from a stream of its own.

    A row's tokens then depend on its seed and not on its neighbours in the batch. `logprobs` collects
    log pi(token), one (B,) tensor per position, before any truncation to top-k or top-p.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[int]) -> None:
        self.logprobs: list[Tensor] = []
        self._temperature = sampling.temperature or 1.0
        self._truncate = LogitsProcessorList(
            ([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else [])
            + ([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else [])
        )
        self._uniforms = None if sampling.temperature == 0 else _uniforms(streams, sampling.max_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = (scores.float() / self._temperature).log_softmax(-1)  # (B, V)
        if self._uniforms is None:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            uniforms = self._uniforms[:, len(self.logprobs)].to(scores.device)
            chosen = _draw(self._truncate(input_ids, logprobs), uniforms)  # type: ignore[arg-type]
        self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def _draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The inverse of the cumulative distribution at each row's uniform: (B, V), (B,) -> (B, 1)."""
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=logprobs.shape[-1] - 1)


def _uniforms(streams: Sequence[int], length: int) -> Tensor:
    """(B, length) uniforms in [0, 1), each row from the stream of its seed."""
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(length, generator=generator.manual_seed(s), dtype=torch.float64) for s in streams]
    )


def _stream(seed: int, index: int) -> int:
    """An unrelated 63-bit seed for completion `index` of a prompt."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1
