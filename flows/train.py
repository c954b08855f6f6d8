"""Training as one flow run: a task per stage of a step, a page of the dashboard per step."""

import logging
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from prefect import Task, flow, task
from prefect.cache_policies import NO_CACHE

from cat_grpo.config import BudgetConfig, Config
from cat_grpo.metrics import Metrics
from cat_grpo.opening import open_loop
from cat_grpo.selection import alarm
from cat_grpo.step import Loop, Stage, train_step
from flows.artifacts import Dashboard
from flows.gate import ask, refuse_unseen
from flows.secrets import read_secrets

log = logging.getLogger(__name__)


@flow(name="train", flow_run_name="{run_dir}")
async def train(config: Config, run_dir: str) -> str:
    """Train in a run directory, from its latest checkpoint on. Returns the folder of the best checkpoint.

    Args:
        config: What is trained on what, and how.
        run_dir: The run's folder: a new run, or the one that is there, which is gone on with.
    """
    started = time.monotonic()
    refuse_unseen(config.train)
    loop = await open_loop(config, Path(run_dir), await read_secrets(config))
    try:
        await _train_on(loop, started)
    finally:
        await loop.close()
    best = loop.run.checkpoints / "best"
    return str(best if best.exists() else best.with_name("latest"))


def as_task(stage: Stage) -> Stage:
    """The stage as a task `rollouts-000012`: five a step, however many its groups are."""
    return partial(_task(stage.__name__), stage)


@cache
def _task(name: str) -> Task[..., Any]:
    """One for all steps: Prefect takes its time to make one.

    No retries: an exception of ours comes again. Nothing is cached or kept: the run directory holds it all.
    """

    async def run_stage(stage: Stage, step: int) -> Any:
        return await stage(step)

    named = task(name=name, task_run_name=name + "-{step:06d}", cache_policy=NO_CACHE, persist_result=False)
    return named(run_stage)


def spent(budget: BudgetConfig, seconds: Sequence[float], elapsed: float, num_problems: int) -> str | None:
    """What of the budget holds no other step, after steps of so many seconds each; None where one fits.

    `elapsed` are the seconds since the start, `num_problems` those that a step takes.
    """
    if budget.steps and len(seconds) >= budget.steps:
        return f"{budget.steps} steps"
    if budget.problems and (len(seconds) + 1) * num_problems > budget.problems:
        return f"{budget.problems} problems"
    if budget.minutes and elapsed + max(seconds) > 60 * budget.minutes:
        return f"{budget.minutes:g} minutes"
    return None


async def _train_on(loop: Loop, started: float) -> None:
    """Steps, until the last, an alarm or the end of the budget."""
    settings = loop.config.train
    # Steps behind no checkpoint are done again, and their alarms are raised again.
    history = loop.run.metrics()[: loop.next_step]
    if history and (reason := alarm(history, settings)):
        log.warning("%s stopped after step %d and stays so: %s", loop.run.path, len(history), reason)
        return
    if len(history) >= settings.steps:
        log.info("%s has all its %d steps", loop.run.path, settings.steps)
    seconds: list[float] = []
    accept = partial(ask, loop.run) if settings.review_gate else None
    async with Dashboard(loop.run) as dashboard:
        for step in range(loop.next_step, settings.steps):
            begun = time.monotonic()
            await train_step(loop, step, as_task, accept)
            seconds.append(time.monotonic() - begun)
            history = loop.run.metrics()
            reason = alarm(history, settings)
            limit = spent(loop.config.budget, seconds, time.monotonic() - started, settings.problems_per_step)
            if (reason or limit) and loop.next_step != step + 1:
                await as_task(loop.checkpoint)(step)
                history = loop.run.metrics()  # with the checkpoint's score
            await dashboard.show_step(history, reason)
            _log_step(loop, history, reason, limit)
            if reason or limit:
                break
        await dashboard.show_run()


def _log_step(loop: Loop, history: Sequence[Metrics], reason: str | None, limit: str | None) -> None:
    """The line that bars follow, and why no other step comes."""
    done = (len(history), loop.config.train.steps)
    reward = history[-1].get("reward/mean", float("nan"))
    log.info("step %d of %d: reward %.3f", *done, reward, extra={"progress": done})
    if reason:
        log.warning("%s stops after step %d: %s", loop.run.path, len(history), reason)
    elif limit:
        log.info("%s pauses after step %d: its budget of %s is spent", loop.run.path, len(history), limit)
