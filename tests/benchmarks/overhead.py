"""What Prefect costs a step of the lab: the flow, with its tasks, pages and events, beside the bare loop.

Both train the same run, seed and all, a chunk of steps at a time in turn, each first in every other round;
the server is a process of its own, as `cat-grpo serve` starts it. A share is told of the means, of the
medians, and as the median of the rounds.
"""

import argparse
import asyncio
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEPS = 8


@contextmanager
def server(home: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}/api"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/health")
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                raise ChildProcessError((home / "server.log").read_text())
            yield address
        finally:
            process.terminate()
            process.wait()


class Clock(logging.Handler):
    """The seconds of each step but the first of a start, which opens the server's doors."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.last: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "progress"):
            return
        now = time.monotonic()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


async def bare(preset: str, overrides: list[str], run: Path) -> list[float]:
    from cat_grpo.run.train import train
    from cat_grpo.settings import load_config

    return await timed(train(load_config(preset, None, overrides), run))


async def orchestrated(preset: str, overrides: list[str], run: Path) -> list[float]:
    from cat_grpo.settings import load_config
    from flows.train import train

    return await timed(train(load_config(preset, None, overrides), str(run)))


async def timed(training: Awaitable[object]) -> list[float]:
    """Seconds of each of its steps but the first."""
    clock, logger = Clock(), logging.getLogger("cat_grpo.run.train")
    logger.addHandler(clock)
    logger.setLevel(logging.INFO)
    await training
    logger.removeHandler(clock)
    return clock.seconds


def measure(preset: str, rounds: int, runs: Path) -> dict[str, Any]:
    ways = {"bare": bare, "orchestrated": orchestrated}
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for done in range(rounds):
        overrides = [f"train.steps={STEPS * (done + 1)}"]
        for name in list(ways)[:: 1 if done % 2 else -1]:
            seconds[name].append(asyncio.run(ways[name](preset, overrides, runs / name)))
    figures = [
        [json.loads(line)["reward/mean"] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ways
    ]
    assert figures[0] == figures[1]
    every = {name: [time for times in rounds for time in times] for name, rounds in seconds.items()}
    # A step's work is the same both ways, and differs from that of the next: so step by step.
    shares = [1 - bare / whole for bare, whole in zip(*every.values(), strict=True)]
    return {
        "seconds": seconds,
        "median": {name: statistics.median(times) for name, times in every.items()},
        "share": statistics.median(shares),
        "share, quartiles": statistics.quantiles(shares)[::2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--presets", nargs="+", default=["lab-verifiable", "lab-open"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as address:
        os.environ |= {"PREFECT_API_URL": address, "PREFECT_HOME": folder}  # which Prefect reads once
        figures = {
            preset: measure(preset, arguments.rounds, Path(folder) / preset) for preset in arguments.presets
        }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
