"""What the dashboard shows of a run: small pages, one timeline a key. The run directory has everything.

Prefect sends every artifact of a run to the browser at once, so each is small by construction.
"""

import base64
import logging
import re
from collections.abc import Awaitable

import httpx
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.exceptions import PrefectException

from cat_grpo.report import curves_png, reference_rows, step_markdown
from cat_grpo.rundir import RunDir
from cat_grpo.selection import SCORE

log = logging.getLogger(__name__)


async def publish_step(run: RunDir, step: int, alarm: str | None) -> None:
    """The step's figures and references; the curves too where the step has a checkpoint."""
    history, scored = run.metrics(), run.read_step(step)
    key = artifact_key("-".join(run.path.resolve().parts[-2:]))
    page = step_markdown(history, scored, run.config.train.steps, alarm)
    await publish(acreate_markdown_artifact(page, f"{key}-step", f"Step {step + 1}"))
    rows = reference_rows(scored)
    shown = f"Step {step + 1}: {len(rows)} of {len(scored)} references. In full: {run.step_folder(step)}"
    await publish(acreate_table_artifact(rows, f"{key}-references", shown))
    if SCORE in history[-1]:
        # A page with the image in it: below an image artifact Prefect prints the whole data URI as a link.
        image = base64.b64encode(curves_png(history)).decode()
        page = f"![The run's curves](data:image/png;base64,{image})"
        await publish(acreate_markdown_artifact(page, f"{key}-curves", f"Up to step {step + 1}"))


async def publish(artifact: Awaitable[object]) -> None:
    """A server that hiccups costs a page and not the training: the run directory has what the page shows."""
    try:
        await artifact
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("an artifact could not be published: %s: %s", type(error).__name__, error)


def artifact_key(name: str) -> str:
    """Of the characters that Prefect allows: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
