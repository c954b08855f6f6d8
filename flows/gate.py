"""The human gate: a flow that waits in the dashboard until a person has accepted a step's references."""

import logging
from typing import Literal

from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.settings import get_current_settings
from pydantic import Field

from cat_grpo.config import TrainConfig
from cat_grpo.errors import BadInput
from cat_grpo.report.pages import gate_markdown
from cat_grpo.run.rundir import RunDir
from flows.artifacts import inspector_link

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600
"""After a day without an answer the flow run fails; the next one asks again, at the same step."""
POLL_S = 2


class Decision(RunInput):
    """The form that a person fills in."""

    accept: Literal["update", "skip this step"] = Field(
        default="update",
        title="These references",
        description="A skipped step leaves the policy as it is.",
    )
    note: str = Field(default="", title="Note", description="Kept beside the decision in the step's folder.")


def refuse_unseen(config: TrainConfig) -> None:
    """Raises BadInput when nobody could open the gate: Prefect's temporary server has no dashboard."""
    if config.review_gate and not get_current_settings().api.url:
        raise BadInput(
            "train.review_gate: it asks in the dashboard, so start the run there, with cat-grpo serve"
        )


async def ask(run: RunDir, step: int) -> bool:
    """Whether the step's references may train the policy. A person decides this once, and it is kept."""
    decided = run.read_decision(step)
    if decided is None:
        page = gate_markdown(step, run.read_step(step))
        link = inspector_link(run.path, step)
        form = Decision.with_initial_data(description=f"{link}\n\n{page}" if link else page)
        log.info("step %d waits for a person to accept its references", step + 1)
        decision = await apause_flow_run(wait_for_input=form, timeout=PATIENCE_S, poll_interval=POLL_S)
        decided = decision.accept == "update"
        run.write_decision(step, decided, decision.note)
    if not decided:
        log.info("step %d is skipped: its references were not accepted", step + 1)
    return decided
