"""Sets up what the dashboard offers: the deployments of prefect.yaml, their work pool, and automations.

Every start does this again. It keeps the schedules, pauses, limits and automations that a user changed in the
dashboard. The rest of a deployment comes from prefect.yaml.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import (
    AutomationCore,
    CancelFlowRun,
    ChangeFlowRunState,
    EventTrigger,
    PauseDeployment,
    Posture,
)
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from cat_grpo.errors import Stopped
from flows.artifacts import ALARM, RUN_RESOURCE

POOL = "cat-grpo"
PREFECT = (sys.executable, "-m", "prefect")
ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
PAUSES = ("Paused", "Suspended")
"""A paused run waits for a person in its process. A suspended run has no process; *Pause* suspends it."""
LIMIT_S = 24 * 3600


async def apply(prefect_file: Path, num_slots: int, heartbeat_s: int, environment: Mapping[str, str]) -> None:
    """Make the server of `environment` offer what `prefect_file` says, `num_slots` runs at a time.

    A run that is silent for three heartbeats is taken for dead. Stopped when Prefect refuses the
    file.
    """
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
        async with get_client() as client:
            await _make_pool(client, num_slots)
            known = await _pauses(client)
            for automation in (silent_runs_crash(heartbeat_s), alarm_pauses(), long_runs_end()):
                if not await client.read_automations_by_name(automation.name):
                    await client.create_automation(automation)
    _deploy(prefect_file, known, environment)


def silent_runs_crash(heartbeat_s: int) -> AutomationCore:
    """Marks a run as crashed when its worker has died. Otherwise it would be Running for ever."""
    alive = _events("heartbeat", "AwaitingRetry")  # a run is silent for a minute between its two tries
    return AutomationCore(
        name="cat-grpo: a run whose worker died has crashed",
        description="Its next run resumes from the last finished step.",
        trigger=_overdue(after=alive, expect=alive | _events(*ENDS, *PAUSES), limit_s=3 * heartbeat_s),
        actions=[
            ChangeFlowRunState(
                name=None, state=StateType.CRASHED, message="No sign of life: its worker died.", force=False
            )
        ],
    )


def alarm_pauses() -> AutomationCore:
    """An example of a reaction to an alarm; off until a user turns it on."""
    return AutomationCore(
        name="cat-grpo: an alarm pauses its deployment (an example)",
        description="A run that an alarm stopped stays stopped, so its schedule would only start it in vain.",
        enabled=False,
        trigger=EventTrigger(
            match={"prefect.resource.id": f"{RUN_RESOURCE}*"},  # type: ignore[arg-type]
            posture=Posture.Reactive,
            expect={ALARM},
        ),
        actions=[PauseDeployment(source="inferred", deployment_id=None)],
    )


def long_runs_end() -> AutomationCore:
    """An example of a time limit; off until a user turns it on."""
    return AutomationCore(
        name="cat-grpo: a run that takes longer than a day is cancelled (an example)",
        description="Its next run resumes from the last finished step. A pause restarts the day.",
        enabled=False,
        trigger=_overdue(after=_events("Running"), expect=_events(*ENDS, *PAUSES), limit_s=LIMIT_S),
        actions=[CancelFlowRun()],
    )


def _overdue(after: set[str], expect: set[str], limit_s: int) -> EventTrigger:
    """Fires for a run when no `expect` event follows one of its `after` events within `limit_s`."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        after=after,
        expect=expect,
        within=timedelta(seconds=limit_s),
    )


def _events(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


async def _make_pool(client: PrefectClient, num_slots: int) -> None:
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        description="Runs on this machine, as many at a time as it has GPUs; the others wait.",
        base_job_template=ProcessWorker.get_default_base_job_template(),
        concurrency_limit=num_slots,
    )
    with suppress(ObjectAlreadyExists):
        await client.create_work_pool(pool)


async def _pauses(client: PrefectClient) -> dict[str, bool]:
    """Whether each existing deployment is paused, by its name."""
    return {deployment.name: deployment.paused for deployment in await client.read_deployments()}


def _deploy(prefect_file: Path, known: Mapping[str, bool], environment: Mapping[str, str]) -> None:
    """Applies the file with Prefect's own command, because only that reads it. Stopped if it fails."""
    plan: dict[str, Any] = yaml.safe_load(prefect_file.read_text(encoding="utf-8"))
    for deployment in plan["deployments"]:
        if deployment["name"] in known:
            deployment.pop("schedules", None)  # a deployment without any keeps its present ones
            deployment["paused"] = known[deployment["name"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(plan), encoding="utf-8")
        command = [*PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise Stopped(f"{prefect_file} could not be applied: {done.stdout}{done.stderr}")
