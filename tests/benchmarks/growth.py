"""Does a step take longer when more steps are behind it? A long run whose models cost nothing.

    python tests/benchmarks/growth.py --steps 2000

Everything is a run's own but the words (scripted) and the update (none): data, order, stages, files, metrics,
alarms and checkpoints. The last steps are compared with the first of the same process.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cat_grpo.engines import Engines
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.learner.batches import Batch
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.train import train_on
from cat_grpo.settings import load_config

COMPARED = 100
"""Steps at either end."""


class Still:
    """A learner that is never moved, and is saved and restored as ever."""

    def __init__(self, learner: Any) -> None:
        self.save, self.restore, self.close = learner.save, learner.restore, learner.close

    def update(self, batch: Batch) -> dict[str, float]:
        return {"rows": float(len(batch.rows)), "rows_with_signal": 0.0, "entropy": 1.0, "loss": 0.0}


class Clock(Observer):
    """When each step was done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    async def figures(self, run: Any, history: Sequence[Any], reason: str | None) -> None:
        self.times.append(time.perf_counter())

    def seconds(self, steps: slice) -> float:
        took = [end - start for start, end in zip(self.times, self.times[1:], strict=False)]
        return sum(took[steps])


async def measure(steps: int, folder: Path) -> dict[str, float]:
    settings = ["train.problems_per_step=8", "rollout.group_size=4", f"train.steps={steps}"]
    config = load_config("lab-verifiable", overrides=[*settings, "train.max_consensus=none"])
    engine: Any = ScriptedEngine(lambda prompt, i: rf"\boxed{{{i % 2}}}")
    clock = Clock()
    async with open_loop(config, folder) as loop:
        learner: Any = Still(loop.learner)
        loop = replace(loop, engines=Engines(engine, engine, engine), live=engine, learner=learner)
        clock.times[0] = time.perf_counter()
        await train_on(loop, clock, time.monotonic())
    started = time.perf_counter()
    async with open_loop(config, folder) as loop:
        opened = time.perf_counter() - started
        assert len(loop.history) == steps
    first, last = clock.seconds(slice(COMPARED)), clock.seconds(slice(-COMPARED, None))
    return {
        "steps": steps,
        "first_s": round(first, 3),
        "last_s": round(last, 3),
        "ratio": round(last / first, 3),
        "opening_s": round(opened, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = asyncio.run(measure(arguments.steps, Path(temporary) / "run"))
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
