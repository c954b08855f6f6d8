"""Attention over packed rollouts: a group's prompt is stored once, and each of its rollouts reads it.

A packed row is a list of spans of tokens. A token sees what comes before it in its own span and in the
span's prompt, and nothing else. So each rollout has its own causal attention, full or through a window.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from cat_grpo.errors import BadInput

PACKED = "cat_grpo_packed"
"""The name under which transformers knows `packed_attention`."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of one packed row that one attention call handles: prompts, or all rollouts of one prompt."""

    prompt: slice
    """The tokens that all these spans see; empty for prompts."""
    index: Tensor
    """(S, C): the places of each span's tokens, padded with its last place."""
    filled: Tensor
    """(tokens,): the places in the flat index that are not padding."""
    visible: Tensor
    """(C, prompt + C): True where a token of the span may look."""

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], prompt: slice = slice(0, 0)) -> "Spans":
        length = torch.tensor(lengths)[:, None]
        column = torch.arange(max(lengths))
        index = torch.tensor(starts)[:, None] + torch.minimum(column, length - 1)
        shared = prompt.stop - prompt.start
        visible = torch.ones(len(column), shared + len(column), dtype=torch.bool).tril(shared)
        return cls(prompt, index, (column < length).flatten().nonzero().flatten(), visible)

    def rows(self) -> list[Tensor]:
        """The tokens of each span."""
        filled = torch.zeros(self.index.numel(), dtype=torch.bool)
        filled[self.filled] = True
        return [row[mask] for row, mask in zip(self.index, filled.view_as(self.index), strict=True)]

    def to(self, device: torch.device) -> "Spans":
        return Spans(self.prompt, *(x.to(device) for x in (self.index, self.filled, self.visible)))


@dataclass(frozen=True, slots=True)
class Layout:
    """All spans of one packed row."""

    spans: tuple[Spans, ...]
    tokens: Tensor
    """(T,): the tokens of the spans, end to end."""
    order: Tensor
    """(T,): the place of each token in `tokens`."""
    keys: Tensor
    """(K,): the tokens that each span may look at, end to end: its prompt's, then its own."""
    token_ends: Tensor
    """(spans + 1,) int32: where each span ends among the tokens, after a 0."""
    key_ends: Tensor
    """(spans + 1,) int32: where each span ends among the keys, after a 0."""
    longest: tuple[int, int]
    """The largest number of tokens, and of keys, in one span."""

    @classmethod
    def of(cls, spans: Sequence[Spans]) -> "Layout":
        own = [(part.prompt, row) for part in spans for row in part.rows()]
        seen = [torch.cat([torch.arange(prompt.start, prompt.stop), row]) for prompt, row in own]
        tokens = torch.cat([row for _, row in own])
        lengths, key_lengths = [len(row) for _, row in own], [len(keys) for keys in seen]
        return cls(
            tuple(spans),
            tokens,
            tokens.argsort(),
            torch.cat(seen),
            _ends(lengths),
            _ends(key_lengths),
            (max(lengths), max(key_lengths)),
        )

    def to(self, device: torch.device) -> "Layout":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type is Tensor}
        return replace(self, spans=tuple(part.to(device) for part in self.spans), **moved)


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """(1, heads, T, d), (1, kv_heads, T, d) twice -> (1, T, heads, d).

    Padding comes after all tokens of a span, so the causal mask hides it from them. BadInput for attention
    that caps its logits.
    """
    if softcap is not None:
        raise BadInput(f"{type(module).__name__} caps its logits: it cannot be packed")
    del attention_mask, dropout, unused
    repeats = query.shape[1] // key.shape[1]
    query = query[0].transpose(0, 1)  # (T, heads, d)
    key, value = (x[0].transpose(0, 1).repeat_interleave(repeats, dim=1) for x in (key, value))
    by_span = _flash if _has_flash(query) else _masked
    attended = by_span(query, key, value, layout, scaling, sliding_window)
    return attended[layout.order].unsqueeze(0), None


def _has_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None
) -> Tensor:
    """Handles all spans in one call, without padding: (T, heads, d) each -> the spans' tokens, end to end."""
    attended: Any = varlen_attn(
        query[layout.tokens],
        key[layout.keys],
        value[layout.keys],
        layout.token_ends,
        layout.key_ends,
        *layout.longest,
        scale=scaling,
        # A span's tokens are the last of its keys, and the kernel aligns them so.
        window_size=(-1 if window is None else window - 1, 0),
    )
    return attended


def _masked(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None
) -> Tensor:
    """Does the same with padding: one call for the prompts, and one for each prompt's rollouts."""
    outputs = []
    for part in layout.spans:
        index = part.index
        attended = scaled_dot_product_attention(
            query[index].transpose(1, 2),  # (S, heads, C, d)
            _with_prompt(key, part.prompt, index),  # (S, heads, prompt + C, d)
            _with_prompt(value, part.prompt, index),
            attn_mask=_through(part, window),
            scale=scaling,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1)[part.filled])
    return torch.cat(outputs)


def _with_prompt(values: Tensor, prompt: slice, index: Tensor) -> Tensor:
    """(T, heads, d) -> (S, heads, prompt + C, d)."""
    shared = values[prompt].expand(len(index), -1, -1, -1)
    return torch.cat([shared, values[index]], dim=1).transpose(1, 2)


def _through(part: Spans, window: int | None) -> Tensor:
    """The mask of what is visible and less than `window` tokens back."""
    shared = part.prompt.stop - part.prompt.start
    return part.visible if window is None else part.visible.triu(shared - window + 1)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Replaces the model's own attention inside the `with` block."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
