"""transformers in this process, on a CPU or a GPU: the engine that needs nothing else.

It can share the learner's live module, and then serves every update without a copy.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cat_grpo.config import ModelConfig
from cat_grpo.engines import Sampling
from cat_grpo.head import head_logprobs
from cat_grpo.lora import adapters_off
from cat_grpo.records import Completion, Generation, LabelRead, Messages
from cat_grpo.shipped import shipped

HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"

T = TypeVar("T")


def model_folder(path: str) -> str:
    """Where a model is: `lab` stands for the one that ships with cat_grpo."""
    return str(shipped("data", "lab", "model")) if path == "lab" else path


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
    """The model in evaluation mode on its device, in `dtype` or the config's. ValueError when it has none."""
    tokenizer = load_tokenizer(config.path)
    with _bad_model(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(config.path), dtype=dtype or resolve_dtype(config)
        )
    torch.nn.Module.to(model, resolve_device(config))
    return model.eval(), tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, able to pad. ValueError when there is none, or it knows no chats."""
    folder = model_folder(path)
    if not (Path(folder).is_dir() or re.fullmatch(HUB_ID, folder)):
        raise ValueError(f"model {path!r}: no such folder")
    with _bad_model(path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ValueError(f"model {path!r}: its tokenizer has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _bad_model(path: str) -> Iterator[None]:
    """What the library says of a folder or a name that it cannot read, as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"model {path!r}: {first_line}") from error


class HFEngine:
    """One model and its tokenizer. Calls queue up; each runs whole, off the event loop."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig
    ) -> None:
        self._model: Any = model  # transformers' types do not tell that it can generate
        self._tokenizer = tokenizer
        self._config = config
        self._end_ids = _end_of_turn_ids(model, tokenizer)
        self._specials = _special_tokens(tokenizer)
        # One thread for all calls: a pool would give each of its threads an OpenMP team of its own.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-engine")
        self._set_up: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def open(cls, config: ModelConfig) -> "HFEngine":
        return cls(*load_model_and_tokenizer(config), config)

    def without_adapters(self) -> "HFEngine":
        """The model as it was before its adapters: the same weights, and one queue for the calls to both."""
        other = copy(self)
        other._set_up = partial(adapters_off, self._model)
        return other

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        return await self._run(lambda: self._generate(prompts, sampling))

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        return await self._run(lambda: self._read_labels(prompts, labels))

    async def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return await self._run(lambda: self._score(prompts, completions))

    async def load_weights(self, checkpoint: Path) -> None:
        await self._run(lambda: self._load_weights(checkpoint))

    async def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._without_gradients, work)

    def _without_gradients(self, work: Callable[[], T]) -> T:
        """The learner's float32 weights, too, are computed with in the engine's own dtype."""
        dtype = resolve_dtype(self._config)
        is_lower = dtype != torch.float32
        autocast = torch.autocast(self._model.device.type, dtype, enabled=is_lower)
        with torch.inference_mode(), autocast, self._set_up():
            return work()

    def _load_weights(self, checkpoint: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self._model.dtype)
        self._model.load_state_dict(loaded.state_dict())

    def _generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        ids = [self._encode(messages) for messages in prompts]
        seeds = sampling.seeds or [int(torch.randint(2**62, ())) for _ in prompts]
        completions: dict[int, tuple[Completion, ...]] = {}
        for batch in self._batches([len(row) for row in ids], sampling.max_tokens, sampling.n):
            streams = [_stream(seeds[i], j) for i in batch for j in range(sampling.n)]
            sampler = _Sampler(sampling, streams)
            rows = [ids[i] for i in batch for _ in range(sampling.n)]
            made = self._decode(rows, sampling.max_tokens, sampler)
            for position, i in enumerate(batch):
                completions[i] = tuple(made[position * sampling.n : (position + 1) * sampling.n])
        return [Generation(tuple(row), completions[i]) for i, row in enumerate(ids)]

    def _decode(
        self, rows: Sequence[Sequence[int]], max_tokens: int, sampler: "_Sampler"
    ) -> list[Completion]:
        input_ids, attention_mask = self._left_padded(rows)
        generation_config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,  # the sampler leaves one token to choose from
            eos_token_id=self._end_ids,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([sampler]),
        )
        token_ids = output[:, input_ids.shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        return [self._completion(*row) for row in zip(token_ids, logprobs, strict=True)]

    def _completion(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        ends = [t for t, token in enumerate(token_ids) if token in self._end_ids]
        length = ends[0] + 1 if ends else len(token_ids)
        token_ids = token_ids[:length]
        text = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        return Completion(text, tuple(token_ids), tuple(logprobs[:length]), "stop" if ends else "length")

    def _read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        label_ids = _label_token_ids(self._tokenizer, labels)
        ids = [self._encode(messages) for messages in prompts]
        reads: dict[int, LabelRead] = {}
        for batch in self._batches([len(row) for row in ids], 0, 1):
            input_ids, attention_mask = self._left_padded([ids[i] for i in batch])
            output = self._model(**_inputs(input_ids, attention_mask), logits_to_keep=1)
            logits = output.logits[:, -1].float()  # (B, V)
            probabilities = logits.softmax(-1)
            per_label = torch.stack([probabilities[:, ids].sum(-1) for ids in label_ids], dim=1).tolist()
            reads.update(zip(batch, (LabelRead(tuple(row)) for row in per_label), strict=True))
        return [reads[i] for i in range(len(prompts))]

    def _score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        scores: dict[int, tuple[float, ...]] = {}
        for batch in self._batches([len(row) for row in rows], 0, 1):
            input_ids, attention_mask = self._left_padded([rows[i] for i in batch])
            longest = max(len(completions[i]) for i in batch)
            hidden = self._model.get_decoder()(**_inputs(input_ids, attention_mask)).last_hidden_state
            tokens = input_ids[:, input_ids.shape[1] - longest :]
            # In tiles, because all positions x vocabulary would be tens of gigabytes.
            logprobs = head_logprobs(
                hidden[:, -longest - 1 : -1].flatten(0, 1),
                self._model.get_output_embeddings().weight,
                tokens.flatten(),
            )
            for i, row in zip(batch, logprobs.view_as(tokens).tolist(), strict=True):
                scores[i] = tuple(row[longest - len(completions[i]) :])
        return [scores[i] for i in range(len(rows))]

    def _encode(self, messages: Messages) -> list[int]:
        """Prompt ids. Special tokens in a message are text, not control, and are broken up first."""
        safe = [{**message, "content": _defuse(message["content"], self._specials)} for message in messages]
        ids: Any = self._tokenizer.apply_chat_template(
            safe, add_generation_prompt=True, return_dict=False, **self._config.chat_template_kwargs
        )
        return ids

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return input_ids.to(self._model.device), attention_mask.to(self._model.device)

    def _batches(self, lengths: Sequence[int], max_tokens: int, n: int) -> Iterator[list[int]]:
        """Indices, longest first, in batches whose padded size stays within the budget where one row does."""
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
    """Of a forward pass over left-padded rows."""
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


def _defuse(text: str, specials: Sequence[str]) -> str:
    for special in specials:
        text = text.replace(special, f"{special[0]} {special[1:]}")
    return text


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All that the tokenizer reads as control. Its named ones alone may lack the tokens that open a turn."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def _end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def _label_token_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
    """The tokens that spell each label whole (yes, Yes, " yes", ...), else the first token of the label."""
    ids: list[list[int]] = []
    for label in labels:
        spellings = [
            space + word for space in ("", " ") for word in (label, label.capitalize(), label.upper())
        ]
        encoded = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        ids.append(sorted({e[0] for e in encoded if len(e) == 1}) or [encoded[0][0]])
    flat = [i for label_ids in ids for i in label_ids]
    if len(set(flat)) < len(flat):
        raise ValueError(
            f"labels {tuple(labels)} begin with the same token: they cannot be told apart in one"
        )
    return ids
