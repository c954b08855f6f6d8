"""References that are one of the group's own rollouts, or its answer."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engines
from cat_grpo.method import needs
from cat_grpo.method.answers import rollout_answers, votes_of
from cat_grpo.records import KINDS_WITH_ANSWER, Group, Reference


@needs(kinds=KINDS_WITH_ANSWER)
async def majority(
    groups: Sequence[Group], engines: Engines, config: Config, seeds: Sequence[int]
) -> list[Reference]:
    """The most frequent final answer by equivalence class, in a box; a tie goes to the one that came first.

    `chosen` is the first rollout with it.
    """
    references = []
    for group, vote in zip(groups, await votes_of(groups, config.reward.equivalence), strict=True):
        if vote.answer is None:
            references.append(Reference(None, refused="no rollout has a final answer"))
            continue
        chosen = rollout_answers(group).index(vote.answer)
        tokens = group.rollouts[chosen].token_ids
        references.append(Reference(rf"\boxed{{{vote.answer}}}", token_ids=tokens, chosen=chosen))
    return references
