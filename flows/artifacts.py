"""Shows a run in the dashboard: small pages, one timeline per key. The run directory has everything.

Prefect sends all artifacts of a run to the browser at once, so each one is kept small.
"""

import asyncio
import base64
import logging
import os
import re
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.events import emit_event
from prefect.exceptions import PrefectException

from cat_grpo.metrics import SCORE, Metrics
from cat_grpo.report.curves import picture
from cat_grpo.report.pages import MAX_ROWS, reference_rows, run_markdown, step_markdown
from cat_grpo.report.reviews import REVIEWS, accuracy, read_reviews
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.stopping import alarm, warnings

log = logging.getLogger(__name__)

T = TypeVar("T")

INSPECTOR_URL, INSPECTED = "CAT_GRPO_INSPECTOR_URL", "CAT_GRPO_INSPECTED"
"""Variables for the inspector's address and the folder of runs that it shows. `cat-grpo serve` sets them."""
ALARM, RUN_RESOURCE = "cat_grpo.alarm", "cat_grpo.run."
"""The event that automations can wait for, and the prefix of the id of the run that it is about."""


class Dashboard:
    """The pages of one run. They are made while the next step is sampled."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._key = run_key(run.path)
        self._progress: UUID | None = None
        self._showing: asyncio.Task[None] | None = None

    async def show_step(self, history: Sequence[Metrics], reason: str | None) -> None:
        """Starts to show the last step's figures and references, and the curves if it has a checkpoint."""
        await self.shown()
        self._showing = asyncio.create_task(self._show_step(list(history), reason))  # it grows

    async def shown(self) -> None:
        """Waits for the pages of the last step."""
        if self._showing:
            await self._showing

    async def _show_step(self, history: Sequence[Metrics], reason: str | None) -> None:
        self._raise_alarms(history, reason)
        step, train = len(history) - 1, self.run.config.train
        rewarded = await asyncio.to_thread(self.run.read_step, step, MAX_ROWS)
        link = inspector_link(self.run.path, step)
        page = _headed(
            link, step_markdown(history, rewarded, train.steps, reason, warnings(history).values())
        )
        await publish(acreate_markdown_artifact(page, f"{self._key}-step", f"Step {step + 1}"))
        rows = reference_rows(rewarded)
        everything = link or f"In full: {self.run.step_folder(step)}"
        shown = f"Step {step + 1}: {len(rows)} of {train.problems_per_step} references. {everything}"
        await publish(acreate_table_artifact(rows, f"{self._key}-references", shown))
        if SCORE in history[-1]:
            # A page that contains the image, because Prefect prints the whole data URI of an image artifact.
            image = base64.b64encode((await asyncio.to_thread(picture, history)).encode()).decode()
            page = f"![The run's curves](data:image/svg+xml;base64,{image})"
            await publish(acreate_markdown_artifact(page, f"{self._key}-curves", f"Up to step {step + 1}"))
        await self._show_progress(step + 1)

    async def show_run(self) -> None:
        """Shows the report at the end of a flow run."""
        await self.shown()
        history, train = self.run.metrics(), self.run.config.train
        if history:
            said = accuracy(read_reviews(self.run.path / REVIEWS))
            page = run_markdown(history, train.steps, alarm(history, train), said)
            page = _headed(inspector_link(self.run.path, len(history) - 1), page)
            await publish(acreate_markdown_artifact(page, f"{self._key}-report", str(self.run.path)))

    async def _show_progress(self, num_done: int) -> None:
        percent = 100 * num_done / self.run.config.train.steps
        if self._progress is None:
            made = acreate_progress_artifact(percent, f"{self._key}-progress", "Finished steps, in percent")
            self._progress = await publish(made)
        else:
            await publish(aupdate_progress_artifact(self._progress, percent))

    def _raise_alarms(self, history: Sequence[Metrics], reason: str | None) -> None:
        """Emits events: why the run stops, and every warning that the step before did not have."""
        before = warnings(history[:-1]) if len(history) > 1 else {}
        new = {about: words for about, words in warnings(history).items() if about not in before}
        for about, words in {**new, **({"stop": reason} if reason else {})}.items():
            emit_event(
                ALARM,
                resource={
                    "prefect.resource.id": f"{RUN_RESOURCE}{self._key}",
                    "prefect.resource.name": str(self.run.path),
                    "cat_grpo.alarm.about": about,
                },
                payload={"step": len(history), "reason": words, "stops": about == "stop"},
            )


async def publish(artifact: Awaitable[T]) -> T | None:
    """The id of the artifact; None when the server fails. That costs only a page and not the training,
    because the run directory has what the page shows."""
    try:
        return await artifact
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("an artifact could not be published: %s: %s", type(error).__name__, error)
        return None


def _headed(link: str, page: str) -> str:
    return f"{link}\n\n{page}" if link else page


def inspector_link(run_path: Path, step: int) -> str:
    """A Markdown link to the step's page; empty when no inspector is known to show the run."""
    url, inspected = os.environ.get(INSPECTOR_URL), os.environ.get(INSPECTED)
    path = run_path.resolve()
    if not url or not inspected or not path.is_relative_to(Path(inspected).resolve()):
        return ""
    name = quote(path.relative_to(Path(inspected).resolve()).as_posix())
    return f"[Every group of this step in the inspector]({url.rstrip('/')}/run/{name}/step/{step})"


def run_key(path: Path) -> str:
    """The run's artifact key, made from its last two folders."""
    return artifact_key("-".join(path.resolve().parts[-2:]))


def artifact_key(name: str) -> str:
    """The name in the characters that Prefect allows: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
