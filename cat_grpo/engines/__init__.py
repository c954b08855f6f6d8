"""Policy, anchor and judge are three roles of one interface: a model that can be asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cat_grpo.records import Generation, LabelRead, Messages


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine draws completions. The names are vLLM's."""

    max_tokens: int
    n: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seeds: Sequence[int] | None = None
    """One per prompt; completion i of a prompt draws from (seed, i) alone, whatever stands beside it in the
    batch. None: fresh randomness."""


class Engine(Protocol):
    """A model that can be asked. Answers come in the order of the prompts."""

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        """One Generation per prompt, each with `sampling.n` completions."""
        ...

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        """The probability of each label as the first token of the answer: one prefill, no decoding.

        Raises ValueError when two labels begin with the same token.
        """
        ...

    async def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """log pi(token) in nats at temperature 1 for each token of each completion; ids in, as returned by
        `generate`."""
        ...

    async def load_weights(self, checkpoint: Path) -> None:
        """Serve the weights of this checkpoint from the next call on."""
        ...

    async def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """Who plays which role."""

    policy: Engine
    anchor: Engine
    judge: Engine
