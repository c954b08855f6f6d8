"""Stage 3: rollouts and their reference become rewards in [0, 1] (CaT, section 3.2)."""

import asyncio
from collections.abc import Sequence

from cat_grpo.answers import extract_answer, same_answer
from cat_grpo.config import Equivalence, RewardConfig
from cat_grpo.engines import Engine
from cat_grpo.records import Completion, Group, Reference, RolloutScore, Rubric, ScoredGroup, Verdict
from cat_grpo.rubrics import judge_criteria, propose_rubrics


async def score_groups(
    groups: Sequence[Group],
    references: Sequence[Reference],
    anchor: Engine,
    judge: Engine,
    config: RewardConfig,
    prompt_set: str,
) -> list[ScoredGroup]:
    """One scored group per group, in order. Without a usable reference or rubric its rewards are all None."""
    rubrics = await _rubrics(groups, references, anchor, config, prompt_set)
    verdicts = await _verdicts(groups, rubrics, judge, config, prompt_set)
    return [
        ScoredGroup(
            group,
            reference,
            rubric,
            await asyncio.to_thread(_verifiable_scores, group, reference, config)
            if group.problem.kind == "verifiable"
            else _open_scores(group, group_verdicts, config),
        )
        for group, reference, rubric, group_verdicts in zip(
            groups, references, rubrics, verdicts, strict=True
        )
    ]


def agreement(answer: str | None, reference_answer: str, equivalence: Equivalence) -> float:
    """1 when the final answers are equal, else 0 (CaT eq. 2). A rollout without an answer is wrong."""
    return float(answer is not None and same_answer(equivalence)(answer, reference_answer))


def rubric_reward(verdicts: Sequence[Verdict], min_judged_frac: float, is_soft: bool = False) -> float | None:
    """The share of yes among the verdicts that were given (CaT eq. 4); None when too few were.

    Soft: the mean of the probabilities of yes, where the judge told them.
    """
    given = [verdict for verdict in verdicts if verdict.satisfied is not None]
    if not given or len(given) < min_judged_frac * len(verdicts):
        return None
    values = [
        verdict.probability if is_soft and verdict.probability is not None else float(verdict.satisfied or 0)
        for verdict in given
    ]
    return sum(values) / len(values)


def length_penalty(rollout: Completion, config: RewardConfig) -> float:
    """What the rollout loses for being longer than `length_limit` tokens."""
    over = config.length_limit is not None and len(rollout.token_ids) > config.length_limit
    return config.length_penalty if over else 0.0


def _verifiable_scores(group: Group, reference: Reference, config: RewardConfig) -> tuple[RolloutScore, ...]:
    expected = extract_answer(reference.text) if reference.text is not None else None
    scores = []
    for rollout in group.rollouts:
        answer = extract_answer(rollout.text) if rollout.finish_reason == "stop" else None
        reward = None if expected is None else agreement(answer, expected, config.equivalence)
        scores.append(RolloutScore(reward, length_penalty(rollout, config), answer, ()))
    return tuple(scores)


def _open_scores(
    group: Group, verdicts: Sequence[tuple[Verdict, ...]], config: RewardConfig
) -> tuple[RolloutScore, ...]:
    return tuple(
        RolloutScore(
            rubric_reward(given, config.min_judged_frac, config.soft_verdicts),
            length_penalty(rollout, config),
            None,
            given,
        )
        for rollout, given in zip(group.rollouts, verdicts, strict=True)
    )


async def _rubrics(
    groups: Sequence[Group],
    references: Sequence[Reference],
    anchor: Engine,
    config: RewardConfig,
    prompt_set: str,
) -> list[Rubric | None]:
    """One entry per group; None for verifiable problems and where nothing usable came."""
    texts = {
        i: reference.text
        for i, (group, reference) in enumerate(zip(groups, references, strict=True))
        if group.problem.kind == "open" and reference.text is not None
    }
    proposed = await propose_rubrics(list(texts.values()), anchor, config, prompt_set) if texts else []
    by_index = dict(zip(texts, proposed, strict=True))
    return [by_index.get(i) for i in range(len(groups))]


async def _verdicts(
    groups: Sequence[Group],
    rubrics: Sequence[Rubric | None],
    judge: Engine,
    config: RewardConfig,
    prompt_set: str,
) -> list[list[tuple[Verdict, ...]]]:
    """Per group and rollout, one verdict per criterion; all asked at once, in the rubric's order."""
    questions = [
        (rollout.text, criterion)
        for group, rubric in zip(groups, rubrics, strict=True)
        if rubric is not None
        for rollout in group.rollouts
        for criterion in rubric.criteria
    ]
    answers = iter(await judge_criteria(questions, judge, config, prompt_set) if questions else [])
    return [
        [tuple(next(answers) for _ in (rubric.criteria if rubric else ())) for _ in group.rollouts]
        for group, rubric in zip(groups, rubrics, strict=True)
    ]
