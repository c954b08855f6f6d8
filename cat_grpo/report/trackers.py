"""Sends a run's figures to the tracker that its user has, by that tracker's own library.

They are also in metrics.jsonl.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cat_grpo.errors import BadInput
from cat_grpo.metrics import Metrics

PROJECT = "cat_grpo"


@dataclass(frozen=True, slots=True)
class Tracker:
    """Takes the figures of a run's steps until it is closed."""

    log: Callable[[Metrics, int], object]
    """Called with a step's figures and its number, from 1. A repeated step is logged again."""
    close: Callable[[], object]


def open_tracker(name: str | None, run: Path, settings: Mapping[str, Any], next_step: int) -> Tracker:
    """The tracker. It resumes its own run of the same directory, if there is one; None tracks nothing.

    BadInput when its library is not installed.
    """
    if name is None:
        return Tracker(lambda metrics, step: None, lambda: None)
    opener, module = {
        "tensorboard": (_tensorboard, "torch.utils.tensorboard"),
        "wandb": (_wandb, "wandb"),
        "trackio": (_trackio, "trackio"),
    }[name]
    try:
        library = import_module(module)
    except ImportError as error:
        raise BadInput(f"train.tracker: {name} is not installed: pip install {name}") from error
    return opener(library, run.resolve(), settings, next_step)


def _tensorboard(library: Any, run: Path, settings: Mapping[str, Any], next_step: int) -> Tracker:
    writer = library.SummaryWriter(str(run / "tensorboard"), purge_step=next_step + 1)

    def log(metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(library: Any, run: Path, settings: Mapping[str, Any], next_step: int) -> Tracker:
    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    there = library.init(
        project=PROJECT, id=name, name=_name(run), dir=str(run), config=dict(settings), resume="allow"
    )
    return Tracker(lambda metrics, step: there.log(metrics, step=step), there.finish)


def _trackio(library: Any, run: Path, settings: Mapping[str, Any], next_step: int) -> Tracker:
    there = library.init(
        project=PROJECT,
        name=_name(run),
        config=dict(settings),
        resume="allow",
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return Tracker(lambda metrics, step: there.log(metrics, step=step), there.finish)


def _name(run: Path) -> str:
    return "/".join(run.parts[-2:])
