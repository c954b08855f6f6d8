"""What the dashboard shows of a run: small pages, one timeline a key. The run directory has everything.

Prefect sends every artifact of a run to the browser at once, so each is small by construction.
"""

import base64
import logging
import re
from collections.abc import Awaitable
from pathlib import Path

import httpx
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.exceptions import PrefectException

from cat_grpo.report import (
    curves_png,
    group_markdown,
    reference_rows,
    step_markdown,
)
from cat_grpo.rundir import RunDir
from cat_grpo.selection import SCORE

log = logging.getLogger(__name__)


async def publish_step(run: RunDir, step: int, alarm: str | None) -> None:
    """The step's figures and references; the curves too where the step has a checkpoint."""
    history, scored = run.metrics(), run.read_step(step)
    key, num_steps = artifact_key(run.path), run.config.train.steps
    page = step_markdown(history, num_steps, alarm) + "\n" + group_markdown(scored[0])
    await publish(acreate_markdown_artifact(page, key=f"{key}-step", description=f"Step {step + 1}"))
    rows = reference_rows(scored)
    shown = f"Step {step + 1}: {len(rows)} of {len(scored)} references. Long texts are cut; all of it is in {run.step_folder(step)}"
    await publish(acreate_table_artifact(rows, key=f"{key}-references", description=shown))
    if SCORE in history[-1]:
        await publish(
            acreate_markdown_artifact(
                curves_markdown(history), key=f"{key}-curves", description=f"Up to step {step + 1}"
            )
        )


async def publish(artifact: Awaitable[object]) -> None:
    """A server that hiccups costs a page and not the training: the run directory has what the page shows."""
    try:
        await artifact
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("an artifact could not be published: %s: %s", type(error).__name__, error)


def artifact_key(path: Path) -> str:
    """`demo-verifiable` for runs/demo/verifiable: Prefect allows lowercase letters, digits and dashes."""
    name = "-".join(path.resolve().parts[-2:]).lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "run"
