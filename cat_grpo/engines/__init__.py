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
    """One per prompt; completion i of a prompt draws from (seed, i) alone, whatever stands beside it in the
    batch. None: fresh randomness."""

    def bounded_seeds(self, num_prompts: int) -> list[int | None]:
        """One per prompt, for servers that draw completion i from the seed plus i, as a 64-bit integer."""
        return [seed % 2**62 for seed in self.seeds] if self.seeds else [None] * num_prompts


class NoLogprobsError(Exception):
    """The server tells no probabilities of tokens: labels cannot be read, only written."""


class SyncError(Stopped):
    """An engine does not serve the learner's weights."""


class Engine(Protocol):
    """A model that can be asked. Answers come in the order of the prompts."""

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        """One Generation per prompt, each with `sampling.n` completions."""
        ...

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        """The probability of each label as the first token of the answer: one prefill, no decoding.

        Raises BadInput when two labels begin with the same token, NoLogprobsError where the server refuses to
        tell any; a reply without them is a read that `is_told` is False of.
        """
        ...

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """log pi(token) in nats at temperature 1 for each token of each completion, whose ids are those that
        `generate` has returned."""
        ...

    async def load_weights(self, checkpoint: Path) -> None:
        """Serve the weights of this checkpoint, or its adapters beside the bare weights, from the next call
        on. The folder must stay until another is loaded."""
        ...

    def without_adapters(self) -> "Engine":
        """The bare weights, served beside the adapters by the same engine: a queue or a batch for both."""
        ...

    async def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """Who plays which role. One engine may play several."""

    policy: Engine
    anchor: Engine
    judge: Engine

    async def close(self) -> None:
        """Each of them once, whatever another raises."""
        async with AsyncExitStack() as closing:
            for engine in {id(engine): engine for engine in (self.policy, self.anchor, self.judge)}.values():
                closing.push_async_callback(engine.close)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once, the results in order. Where one fails, the others are cancelled first."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
