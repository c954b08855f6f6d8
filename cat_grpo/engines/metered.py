"""Measures how hard a stage works its engines. It counts calls and answers, so it works for any engine."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cat_grpo.engines import Engine, Sampling
from cat_grpo.records import Generation, LabelRead, Messages, Usage


class Meter:
    """Counts what one stage asks of its engines from one `read` to the next."""

    def __init__(self) -> None:
        self._waiting, self._since = 0, 0.0
        self._start_anew()

    def on(self, engine: Engine) -> Engine:
        """Returns the engine with its calls counted."""
        return _Metered(engine, self)

    def read(self) -> dict[str, float]:
        """Returns the figures since the last read, or {} when nothing was asked.

        tokens_per_s counts completion tokens over the time with at least one prompt in progress. queue_depth
        is the mean number of prompts in progress over that time.
        """
        used, busy = self.used, self._busy
        figures: dict[str, float] = {}
        if self._calls and busy:
            figures = {
                "calls": float(self._calls),
                "tokens_per_s": sum(usage.completion_tokens for usage in used) / busy,
                "prompt_tokens_per_s": sum(usage.prompt_tokens for usage in used) / busy,
                "queue_depth": self._area / busy,
            }
            if retries := sum(usage.retries for usage in used):
                figures["retries"] = float(retries)
            if cost := sum(usage.cost for usage in used):
                figures["cost"] = cost
            if prompt_tokens := sum(usage.prompt_tokens for usage in used):
                figures["cached_frac"] = sum(usage.cached_tokens for usage in used) / prompt_tokens
        self._start_anew()
        return figures

    @contextmanager
    def asked(self, prompts: int) -> Iterator[None]:
        self._calls += prompts
        self._change(prompts)
        try:
            yield
        finally:
            self._change(-prompts)

    def answered(self, usage: Iterable[Usage]) -> None:
        self.used += usage

    def _start_anew(self) -> None:
        self._calls, self._busy, self._area = 0, 0.0, 0.0
        self.used: list[Usage] = []
        """One for each answered prompt."""

    def _change(self, by: int) -> None:
        now = time.monotonic()
        if self._waiting:
            self._busy += now - self._since
            self._area += self._waiting * (now - self._since)
        self._waiting, self._since = self._waiting + by, now


@dataclass(frozen=True, slots=True)
class _Metered(Engine):
    engine: Engine
    meter: Meter

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        with self.meter.asked(len(prompts)):
            generations = await self.engine.generate(prompts, sampling)
        self.meter.answered(generation.usage for generation in generations)
        return generations

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        with self.meter.asked(len(prompts)):
            reads = await self.engine.read_labels(prompts, labels)
        self.meter.answered(read.usage for read in reads)
        return reads

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return await self.engine.logprobs(prompts, completions)

    async def load_weights(self, checkpoint: Path) -> None:
        await self.engine.load_weights(checkpoint)

    def without_adapters(self) -> Engine:
        return _Metered(self.engine.without_adapters(), self.meter)

    async def close(self) -> None:
        await self.engine.close()
