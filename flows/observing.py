"""Shows a run in Prefect: a task run per stage, its pages, and the gate where a person decides."""

import asyncio
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import Pause

from cat_grpo.errors import Stopped
from cat_grpo.metrics import Metrics
from cat_grpo.run.observing import Observer
from cat_grpo.run.rundir import RunDir
from flows.artifacts import Dashboard
from flows.gate import ask

log = logging.getLogger(__name__)


class StageEnded(Stopped):
    """A stage has failed with this error. Its task run shows the error, and the flow run has it in full."""


class TaskRuns(Observer):
    """Shows each stage as a task run `rollouts-000012`: five per step, however many groups it has.

    A task run waits for its stage and does nothing else, so no stage waits for Prefect.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[str, int], asyncio.Future[BaseException | None]] = {}
        self._shown: set[asyncio.Task[None]] = set()
        self._pause: Pause | None = None
        """Prefect raises it where a task run begins after somebody has paused the flow run."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._shown, return_exceptions=True)

    def started(self, stage: str, step: int) -> None:
        if self._pause:
            raise self._pause
        self._ends[stage, step] = end = asyncio.get_running_loop().create_future()
        shown = asyncio.create_task(_task(stage)(end, step))
        self._shown.add(shown)
        shown.add_done_callback(self._ended)

    def finished(self, stage: str, step: int, error: BaseException | None) -> None:
        end = self._ends.pop((stage, step))
        if not end.done():  # a flow run that is cancelled has cancelled it
            end.set_result(error)

    def _ended(self, shown: asyncio.Task[None]) -> None:
        """Keeps a pause for the next stage. Losing a task run only costs what the dashboard shows."""
        self._shown.discard(shown)
        error = None if shown.cancelled() else shown.exception()
        if isinstance(error, Pause):
            self._pause = error
        elif error is not None and not isinstance(error, StageEnded):
            log.warning("a task run could not be shown: %s: %s", type(error).__name__, error)


class Training(TaskRuns):
    """Shows the pages and the gate of a training run beside its task runs."""

    def __init__(self) -> None:
        super().__init__()
        self._dashboard: Dashboard | None = None

    async def __aexit__(self, *_: object) -> None:
        if self._dashboard:
            await self._dashboard.shown()
        await super().__aexit__()

    async def accepts(self, run: RunDir, step: int) -> bool:
        return not run.config.train.review_gate or await ask(run, step)

    async def figures(self, run: RunDir, history: Sequence[Metrics], reason: str | None) -> None:
        self._dashboard = self._dashboard or Dashboard(run)
        await self._dashboard.show_step(history, reason)

    async def ended(self, run: RunDir) -> None:
        """Shows the report at the end of a flow run."""
        self._dashboard = self._dashboard or Dashboard(run)
        await self._dashboard.show_run()


@cache
def _task(stage: str) -> Task[..., Any]:
    """The stage's task. All steps share it, because Prefect is slow to make one.

    It has no retries, because our exceptions would come again. The run directory keeps the results.
    """

    async def show(end: asyncio.Future[BaseException | None], step: int) -> None:
        error = await end
        if error is not None:
            raise StageEnded(f"{type(error).__name__}: {error}")

    named = task(name=stage, task_run_name=stage + "-{step:06d}", cache_policy=NO_CACHE, persist_result=False)
    return named(show)
