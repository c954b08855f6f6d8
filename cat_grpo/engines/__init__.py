"""Policy, anchor and judge are three roles of one interface: a model that can be asked."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cat_grpo.errors import Stopped
from cat_grpo.records import Generation, LabelRead, Messages

T = TypeVar("T")


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
    """One per prompt. Completion i of a prompt depends on (seed, i) alone, never on its neighbours in the
    batch. None draws fresh randomness."""

    def bounded_seeds(self, num_prompts: int) -> list[int | None]:
        """One seed per prompt, below 2**62: servers add i for completion i and need a 64-bit integer."""
        return [seed % 2**62 for seed in self.seeds] if self.seeds else [None] * num_prompts


class NoLogprobsError(Exception):
    """The server returns no token probabilities, so labels can be written but not read."""


class SyncError(Stopped):
    """An engine does not serve the learner's weights."""


class Engine(Protocol):
    """A model that can be asked. Answers come in the order of the prompts."""

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        """One Generation per prompt, each with `sampling.n` completions."""
        ...

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        """The probability of each label as the first token of the answer: one prefill, no decoding.

        Raises BadInput when two labels begin with the same token, and NoLogprobsError when the server refuses
        to return probabilities. A reply without them becomes a read whose `is_told` is False.
        """
        ...

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """log pi(token), in nats at temperature 1, of each token of each completion. The ids must be those
        that `generate` returned."""
        ...

    async def load_weights(self, checkpoint: Path) -> None:
        """Serves this checkpoint's weights, or its adapters beside the bare weights, from the next call on.
        The folder must stay until another checkpoint is loaded."""
        ...

    def without_adapters(self) -> "Engine":
        """Returns this engine serving the bare weights. Both views share one queue or batch."""
        ...

    async def close(self) -> None:
        """Frees the engine's memory."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """The engine of each role. One engine may play several roles."""

    policy: Engine
    anchor: Engine
    judge: Engine

    async def close(self) -> None:
        """Closes each engine once, even when another one fails to close."""
        async with AsyncExitStack() as closing:
            for engine in {id(engine): engine for engine in (self.policy, self.anchor, self.judge)}.values():
                closing.push_async_callback(engine.close)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all at once and returns the results in order. When one fails, cancels the others and raises."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
