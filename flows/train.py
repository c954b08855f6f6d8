"""Training as one flow run: a task per stage and shard, a page of the dashboard per step."""

import inspect
import logging
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from cat_grpo.config import Config
from cat_grpo.selection import alarm
from cat_grpo.step import Loop, Stage, open_loop, train_step
from flows.artifacts import publish_step
from flows.secrets import read_secrets

log = logging.getLogger(__name__)


@flow(name="train", flow_run_name="{run_dir}")
async def train(config: Config, run_dir: str) -> str:
    """Train in a run directory, from its latest checkpoint on. Returns the folder of the best checkpoint."""
    loop = await open_loop(config, Path(run_dir), await read_secrets(config))
    try:
        await _train_on(loop)
    finally:
        await loop.close()
    best = loop.run.checkpoints / "best"
    return str(best if best.exists() else best.with_name("latest"))


def as_task(stage: Stage) -> Stage:
    """The stage as a task `rollouts-000012-00`: step, then shard where the stage has one.

    No retries: an exception of ours comes again. Nothing is cached or kept: the run directory holds it all.
    """
    name = stage.__name__ + "-{step:06d}"
    if "shard" in inspect.signature(stage).parameters:
        name += "-{shard:02d}"
    return task(name=stage.__name__, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)(stage)


async def _train_on(loop: Loop) -> None:
    settings = loop.config.train
    # Steps behind no checkpoint are done again, and their alarms are raised again.
    history = loop.run.metrics()[: loop.next_step]
    if history and (reason := alarm(history, settings)):
        log.warning("%s stopped after step %d and stays so: %s", loop.run.path, len(history), reason)
        return
    if len(history) >= settings.steps:
        log.info("%s has all its %d steps", loop.run.path, settings.steps)
    for step in range(loop.next_step, settings.steps):
        metrics = await train_step(loop, step, wrap=as_task)
        reason = alarm(loop.run.metrics(), settings)
        if reason and loop.next_step != step + 1:
            await as_task(loop.checkpoint)(step)
        await publish_step(loop.run, step, reason)
        log.info(
            "step %d of %d: reward %.3f",
            step + 1,
            settings.steps,
            metrics.get("reward/mean", float("nan")),
            extra={"progress": (step + 1, settings.steps)},
        )
        if reason:
            log.warning("%s stops after step %d: %s", loop.run.path, step + 1, reason)
            return
