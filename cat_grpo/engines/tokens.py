"""Turns text into one model's tokens and back, for every engine that uses token ids."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from cat_grpo.config import ModelConfig
from cat_grpo.errors import BadInput, first_line
from cat_grpo.models import model_folder
from cat_grpo.records import Completion, Messages

HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, able to pad. BadInput when there is none or it has no chat template."""
    folder = model_folder(path)
    if not (Path(folder).is_dir() or re.fullmatch(HUB_ID, folder)):
        raise BadInput(f"model {path!r}: no such folder")
    with readable_model(path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise BadInput(f"model {path!r}: its tokenizer has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def readable_model(path: str) -> Iterator[None]:
    """Turns the library's error about a folder or name that it cannot read into one line of BadInput."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadInput(f"model {path!r}: {first_line(error)}") from error


class ChatTokens:
    """A model's tokenizer and chat template, and the tokens that end its turn."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], template_kwargs: dict[str, Any]
    ) -> None:
        self.end_ids = sorted({i for i in [*end_ids, tokenizer.eos_token_id] if i is not None})
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self._specials = _special_tokens(tokenizer)

    @classmethod
    def of_model(cls, config: ModelConfig) -> "ChatTokens":
        """Reads the folder or hub id, but not the weights. BadInput when it has no tokenizer for chats."""
        tokenizer = load_tokenizer(config.path)
        try:
            declared = GenerationConfig.from_pretrained(model_folder(config.path)).eos_token_id
        except OSError:  # a model need not have one
            declared = None
        return cls(tokenizer, end_of_turn_ids(declared), config.chat_template_kwargs)

    def encode(self, messages: Messages) -> list[int]:
        """The prompt's ids. Special tokens in a message are text, not control, and are broken up first."""
        safe = [{**message, "content": _defuse(message["content"], self._specials)} for message in messages]
        ids: Any = self._tokenizer.apply_chat_template(
            safe, add_generation_prompt=True, return_dict=False, **self._template_kwargs
        )
        return ids

    def completion(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """The sampled completion, up to and including the token that ends the turn."""
        ends = [t for t, token in enumerate(token_ids) if token in self.end_ids]
        length = ends[0] + 1 if ends else len(token_ids)
        text = str(self._tokenizer.decode(list(token_ids[:length]), skip_special_tokens=True))
        return Completion(
            text, tuple(token_ids[:length]), tuple(logprobs[:length]), "stop" if ends else "length"
        )

    def label_ids(self, labels: Sequence[str]) -> list[list[int]]:
        """The tokens that spell each label whole (yes, Yes, " yes", ...), or its first token if none does.

        Raises BadInput when two labels begin with the same token.
        """
        ids: list[list[int]] = []
        for label in labels:
            spellings = [
                space + word for space in ("", " ") for word in (label, label.capitalize(), label.upper())
            ]
            encoded = [self._tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
            ids.append(sorted({e[0] for e in encoded if len(e) == 1}) or [encoded[0][0]])
        flat = [i for label_ids in ids for i in label_ids]
        if len(set(flat)) < len(flat):
            raise BadInput(
                f"labels {tuple(labels)} begin with the same token: one token cannot tell them apart"
            )
        return ids


def end_of_turn_ids(declared: int | Sequence[int] | None) -> list[int]:
    """The ids that a generation config declares as the end, as a list."""
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


def _defuse(text: str, specials: Sequence[str]) -> str:
    for special in specials:
        text = text.replace(special, f"{special[0]} {special[1:]}")
    return text


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All tokens that the tokenizer reads as control. Its named ones may lack those that open a turn."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})
