"""Trains step by step, until the last one, an alarm, or the end of the budget."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cat_grpo.config import BudgetConfig, Config
from cat_grpo.run.observing import Observer, Telling
from cat_grpo.run.opening import open_loop
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.step import Loop, run_step
from cat_grpo.run.stopping import alarm

log = logging.getLogger(__name__)


async def train(
    config: Config,
    run_dir: Path,
    observer: Observer | None = None,
    secrets: Mapping[str, str] | None = None,
) -> RunDir:
    """Trains in `run_dir`. An existing run is resumed from its latest checkpoint.

    `secrets` are the keys that the config names by `prefect:NAME`. BadInput for what cannot be used, Stopped
    where the run cannot continue.
    """
    started = time.monotonic()
    async with open_loop(config, run_dir, secrets) as loop:
        await train_on(loop, observer or Observer(), started)
        return loop.run


async def train_on(loop: Loop, observer: Observer, started: float) -> None:
    """Makes the steps of this start of a run, which began at `started` on the monotonic clock."""
    settings, history = loop.config.train, loop.history
    if history and (reason := alarm(history, settings)):
        log.warning("%s stopped after step %d and stays so: %s", loop.run.path, len(history), reason)
        return
    if len(history) >= settings.steps:
        log.info("%s has all its %d steps", loop.run.path, settings.steps)
    seconds: list[float] = []
    for step in range(loop.next_step, settings.steps):
        begun = time.monotonic()
        history.append(await run_step(loop, step, observer))
        seconds.append(time.monotonic() - begun)
        reason = alarm(history, settings)
        limit = spent(loop.config.budget, seconds, time.monotonic() - started, settings.problems_per_step)
        if reason or limit or len(history) % settings.checkpoint_every == 0 or len(history) == settings.steps:
            with Telling(observer, "checkpoint", step).of_shard():
                await loop.checkpoint(step)
            seconds[-1] = time.monotonic() - begun
            reason = reason or alarm(history, settings)  # its score may be one too many that is no better
            limit = limit or spent(
                loop.config.budget, seconds, time.monotonic() - started, settings.problems_per_step
            )
        else:
            loop.run.add_metrics(history[-1])
        loop.tracker.log(history[-1], len(history))
        await observer.figures(loop.run, history, reason)
        _log_step(loop, reason, limit)
        if reason or limit:
            break


def spent(budget: BudgetConfig, seconds: Sequence[float], elapsed: float, num_problems: int) -> str | None:
    """Returns the limit that leaves no room for another step, or None.

    `seconds` are those of each step of this start, `elapsed` those since it; a step takes `num_problems`.
    """
    if budget.steps and len(seconds) >= budget.steps:
        return f"{budget.steps} steps"
    if budget.problems and (len(seconds) + 1) * num_problems > budget.problems:
        return f"{budget.problems} problems"
    if budget.minutes and elapsed + max(seconds) > 60 * budget.minutes:
        return f"{budget.minutes:g} minutes"
    return None


def _log_step(loop: Loop, reason: str | None, limit: str | None) -> None:
    """Logs the line that progress bars follow, and why no other step comes."""
    done = (len(loop.history), loop.config.train.steps)
    reward = loop.history[-1].get("reward/mean", float("nan"))
    log.info("step %d of %d: reward %.3f", *done, reward, extra={"progress": done})
    if reason:
        log.warning("%s stops after step %d: %s", loop.run.path, done[0], reason)
    elif limit:
        log.info("%s pauses after step %d: its budget of %s is spent", loop.run.path, done[0], limit)
