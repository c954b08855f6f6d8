"""Agreement with the reference's final answer."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engines
from cat_grpo.method import needs
from cat_grpo.method.answers import agreements
from cat_grpo.records import KINDS_WITH_ANSWER, Group, Reference


@needs(kinds=KINDS_WITH_ANSWER)
async def agreement(
    groups: Sequence[Group],
    references: Sequence[Reference],
    engines: Engines,
    config: Config,
    seeds: Sequence[int],
) -> list[list[float | None]]:
    """1 when the final answers are equal, else 0 (CaT eq. 2). A rollout without an answer is wrong."""
    rows = await agreements(groups, references, config.reward.equivalence)
    return [[None if agrees is None else float(agrees) for agrees in row] for row in rows]
