"""Compute as Teacher: explore, estimate references, derive rewards (CaT, figure 1).

Training, evaluation and synthesis all call these three. The config chooses the functions that they call.
Estimation and derivation know nothing of each other, so any pair of them makes a run.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cat_grpo.config import Config
from cat_grpo.engines import Engines, together
from cat_grpo.errors import BadInput
from cat_grpo.method import find, refuse_kind, templates_of
from cat_grpo.method.answers import Vote, agreements, extract_answer, rollout_answers, votes_of
from cat_grpo.method.prompts import refuse_missing
from cat_grpo.method.references import ESTIMATORS, Estimator
from cat_grpo.method.rewards import REWARDS, Reward, length_penalty, weighted_sum
from cat_grpo.method.rewards.judge import refuse_silent_judge
from cat_grpo.method.rollouts import generate_rollouts, solve_template
from cat_grpo.records import (
    Group,
    Kind,
    PartReward,
    Problem,
    Reference,
    RewardedGroup,
    RolloutReward,
    kinds_of,
)


async def explore(
    problems: Sequence[Problem], engines: Engines, config: Config, seeds: Sequence[int]
) -> list[Group]:
    """Samples one group of rollouts per problem, in order; `seeds` has one per problem."""
    return await generate_rollouts(problems, engines.policy, config, seeds)


async def estimate(
    groups: Sequence[Group], engines: Engines, config: Config, seeds: Sequence[int]
) -> list[Reference]:
    """Makes one reference per group, in order, by the config's estimator, and adds the group's vote.

    `text` is None where the estimator gave nothing usable, and for a problem with a final answer where the
    text has none.
    """
    name = config.reference.estimator
    made = await _awaited(_estimator(config)(groups, engines, config, seeds))
    _check_count(made, groups, "reference.estimator", name)
    votes = await votes_of(groups, config.reward.equivalence)
    return [_completed(*each, name) for each in zip(groups, made, votes, strict=True)]


async def derive(
    groups: Sequence[Group],
    references: Sequence[Reference],
    engines: Engines,
    config: Config,
    seeds: Sequence[int],
) -> list[RewardedGroup]:
    """Rewards every group, in order: the parts of its problem's kind, weighted and added."""
    agrees = await agreements(groups, references, config.reward.equivalence)
    parts: list[dict[str, PartReward]] = [{} for _ in groups]
    for kind in kinds_of(group.problem for group in groups):
        chosen = [i for i, group in enumerate(groups) if group.problem.kind == kind]
        asked = [[values[i] for i in chosen] for values in (groups, references, seeds)]
        names = list(config.reward.parts(kind))
        made = await together(_part(kind, name, asked, engines, config) for name in names)
        for name, rows in zip(names, made, strict=True):
            for i, row in zip(chosen, rows, strict=True):
                parts[i][name] = row
    return [_rewarded(*each, config) for each in zip(groups, references, parts, agrees, strict=True)]


def templates(config: Config, kinds: Iterable[Kind], with_rewards: bool = True) -> list[str]:
    """Returns the templates that problems of these kinds need, to the references or to the rewards."""
    names: dict[str, None] = {}
    for kind in kinds:
        rewards = _rewards(config, kind).values() if with_rewards else ()
        names[solve_template(kind)] = None
        for function in (_estimator(config), *rewards):
            names |= dict.fromkeys(templates_of(function, config, kind))
    return list(names)


def refuse_unusable(config: Config, kinds: Sequence[Kind], with_rewards: bool = True) -> None:
    """BadInput for an estimator, a reward or a template that is not there, or not for these problems."""
    for kind in kinds:
        refuse_kind(_estimator(config), kind, f"reference.estimator: {config.reference.estimator!r}")
        for name, function in _rewards(config, kind).items() if with_rewards else ():
            refuse_kind(function, kind, f"reward.{kind}: {name!r}")
    refuse_missing(config.prompts, templates(config, kinds, with_rewards))


def asks_anchor(config: Config) -> bool:
    """Returns whether the estimator asks the anchor: whether it fills in a template."""
    return bool(getattr(_estimator(config), "templates", ()))


async def refuse_unfit(engines: Engines, config: Config, kinds: Iterable[Kind]) -> None:
    """BadInput for engines that cannot do what the rewards ask of them."""
    if "judge_label" in templates(config, kinds):
        await refuse_silent_judge(engines.judge, config)


def _estimator(config: Config) -> Estimator:
    return find(config.reference.estimator, ESTIMATORS, "reference.estimator")


def _rewards(config: Config, kind: Kind) -> dict[str, Reward]:
    return {name: find(name, REWARDS, f"reward.{kind}") for name in config.reward.parts(kind)}


def _completed(group: Group, reference: Reference, vote: Vote, estimator: str) -> Reference:
    """Completes the estimator's reference with what holds for every estimator."""
    text, answer, refused = reference.text, None, reference.refused
    if text is not None and group.problem.has_final_answer:
        answer = extract_answer(text)
        if answer is None:
            text, refused = None, "it has no final answer"
    return replace(
        reference,
        text=text,
        answer=answer,
        refused=refused,
        problem_id=group.problem.id,
        estimator=estimator,
        majority=vote.answer,
        num_votes=vote.num_votes,
    )


async def _part(
    kind: Kind, name: str, asked: Sequence[Any], engines: Engines, config: Config
) -> list[PartReward]:
    """Asks one part of the reward for these groups, references and seeds, and checks what it gives."""
    groups, references, seeds = asked
    function = find(name, REWARDS, f"reward.{kind}")
    made = await _awaited(function(groups, references, engines, config, seeds))
    _check_count(made, groups, f"reward.{kind}", name)
    rows = [row if isinstance(row, PartReward) else PartReward(tuple(row)) for row in made]
    for group, row in zip(groups, rows, strict=True):
        _check_count(row.rewards, group.rollouts, f"reward.{kind}", name)
        if any(value is not None and not math.isfinite(value) for value in row.rewards):
            raise BadInput(f"reward.{kind}: {name!r}: gave a reward that is not finite; None stands for none")
    return rows


def _rewarded(
    group: Group,
    reference: Reference,
    parts: Mapping[str, PartReward],
    agrees: Sequence[bool | None],
    config: Config,
) -> RewardedGroup:
    rubric, verdicts = next(
        ((part.rubric, part.verdicts) for part in parts.values() if part.rubric is not None),
        (None, [()] * len(group.rollouts)),
    )
    rewards = []
    for i, (rollout, answer) in enumerate(zip(group.rollouts, rollout_answers(group), strict=True)):
        values = {name: part.rewards[i] for name, part in parts.items()}
        total = weighted_sum(values, config.reward.parts(group.problem.kind))
        penalty = length_penalty(rollout, config.reward)
        rewards.append(RolloutReward(total, penalty, values, agrees[i], answer, verdicts[i]))
    return RewardedGroup(group, reference, rubric, tuple(rewards))


async def _awaited(made: Any) -> Any:
    """Awaits what a function gave, if need be: a user's function need not be async."""
    return await made if inspect.isawaitable(made) else made


def _check_count(made: Sequence[Any], wanted: Sequence[Any], setting: str, name: str) -> None:
    if len(made) != len(wanted):
        raise BadInput(f"{setting}: {name!r}: gave {len(made)} results for {len(wanted)}")
