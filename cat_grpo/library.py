"""What `import cat_grpo` gives to scripts and notebooks: each function returns when all is done."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cat_grpo.config import Config
from cat_grpo.evaluation import evaluate as evaluate_file

if TYPE_CHECKING:
    from cat_grpo.run.observing import Observer
    from cat_grpo.run.rundir import RunDir

T = TypeVar("T")


def train(config: Config, run_dir: str | Path, observer: "Observer | None" = None) -> "RunDir":
    """Trains in a run directory and returns it. An existing run is resumed.

    BadInput for what cannot be used, Stopped where the run cannot continue.
    """
    from cat_grpo.run.train import train

    return _finished(train(config, Path(run_dir), observer))


def synthesize(config: Config, out: str | Path) -> list[dict[str, Any]]:
    """Writes a reference per problem of the config's data to a .jsonl or .parquet file; returns its rows."""
    from cat_grpo.run.synthesize import synthesize

    return _finished(synthesize(config, Path(out)))


def evaluate(
    config: Config,
    problems: str | Path,
    model: str | None = None,
    anchor: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Returns means over the problems of a labelled file, each with its standard error `<name>_se`.

    `model` is a checkpoint, a hub id or `lab`, by default the config's; the anchor is by default what a
    checkpoint of ours was trained with.
    """
    return _finished(evaluate_file(config, Path(problems), model, anchor, limit, seed))


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Runs the work to its end: in a thread of its own where this one has an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()
