"""Figures of how hard a stage works its engines, with a clock that the test turns."""

import asyncio
from itertools import count
from types import SimpleNamespace

import pytest

from asking import user
from cat_grpo.engines import Sampling, metered
from cat_grpo.engines.memory import GIB, HALF, TRAINED, engine_share
from cat_grpo.engines.metered import Meter
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.records import LabelRead, Usage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes each time that it is looked at."""
    ticks = count()
    monkeypatch.setattr(metered, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


async def test_tokens_are_counted_over_the_time_in_which_anything_was_asked(clock):
    meter = Meter()
    engine = meter.on(ScriptedEngine(lambda *_: "abc"))  # 4 tokens with the end, in a second
    await engine.generate([user("12345"), user("123")], Sampling(max_tokens=9, n=2))
    assert meter.read() == {
        "calls": 2,
        "tokens_per_s": 16,
        "prompt_tokens_per_s": 8,
        "queue_depth": 2,
        "cached_frac": 0,
    }
    assert meter.read() == {}  # anew


async def test_the_queue_is_as_deep_as_what_is_under_way(clock):
    """Three prompts for three ticks and one for the one in the middle: (3 + 4 + 3) / 3."""
    meter, gate = Meter(), asyncio.Event()

    class Slow(ScriptedEngine):
        async def generate(self, prompts, sampling):
            if len(prompts) == 3:
                await gate.wait()
            return await super().generate(prompts, sampling)

    engine = meter.on(Slow(lambda *_: ""))
    three = asyncio.ensure_future(engine.generate([user("a")] * 3, Sampling(max_tokens=1)))
    await asyncio.sleep(0)
    await engine.generate([user("a")], Sampling(max_tokens=1))
    gate.set()
    await three
    assert meter.read()["queue_depth"] == pytest.approx(10 / 3)


async def test_what_calls_cost_is_told_where_there_is_anything_to_tell(clock):
    class Costly(ScriptedEngine):
        async def read_labels(self, prompts, labels):
            return [LabelRead((1.0, 0.0), Usage(10, 4, 1, retries=2, cost=0.5)) for _ in prompts]

    meter = Meter()
    await meter.on(Costly(lambda *_: "")).read_labels([user("a")] * 3, ("yes", "no"))
    figures = meter.read()
    assert (figures["retries"], figures["cost"], figures["cached_frac"]) == (6, 1.5, 0.4)


async def test_a_call_that_fails_is_not_under_way_any_more(clock):
    class Broken(ScriptedEngine):
        async def generate(self, prompts, sampling):
            raise ConnectionError

    meter = Meter()
    with pytest.raises(ConnectionError):
        await meter.on(Broken(lambda *_: "")).generate([user("a")], Sampling(max_tokens=1))
    await meter.on(ScriptedEngine(lambda *_: "")).generate([user("a")], Sampling(max_tokens=1))
    assert meter.read()["queue_depth"] == 1


BILLION = 10**9


def test_engines_share_what_the_learner_leaves():
    """80 GiB less 15 % are 68; 1B weights are 0.9313 GiB a byte."""
    one_byte = BILLION / GIB
    beside_adapters = (68 - 2 * one_byte) / 80
    assert engine_share(BILLION, 80 * GIB, 1, HALF * BILLION) == pytest.approx(beside_adapters, abs=1e-3)
    beside_full = (68 - 16 * one_byte) / 2 / 80
    assert engine_share(BILLION, 80 * GIB, 2, TRAINED * BILLION) == pytest.approx(beside_full, abs=1e-3)
    assert engine_share(BILLION, 80 * GIB, 1, 0) == pytest.approx(0.85)


def test_what_does_not_fit_is_refused_with_the_sizes():
    """4B weights: 60 GiB to train, which leaves 8 of 68, and two engines need 7.5 + 1 each."""
    with pytest.raises(ValueError, match=r"4\.0B weights needs 8 GiB, and the GPU has 4 for it"):
        engine_share(4 * BILLION, 80 * GIB, 2, 4 * TRAINED * BILLION)
