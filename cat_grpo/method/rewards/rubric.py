"""Rubrics: the anchor proposes yes/no criteria, the judge answers them, the reward is the share of yes."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engine, Engines, Sampling
from cat_grpo.method import needs
from cat_grpo.method.prompts import ask, render
from cat_grpo.method.rewards.judge import judge_criteria
from cat_grpo.method.rewards.parsing import parse_rubric
from cat_grpo.records import Group, PartReward, Reference, Rubric, Verdict


@needs("propose_rubric", "judge_{verdict}")
async def self_rubric(
    groups: Sequence[Group],
    references: Sequence[Reference],
    engines: Engines,
    config: Config,
    seeds: Sequence[int],
) -> list[PartReward]:
    """The share of the criteria, proposed from the reference alone, that are met (CaT eq. 3 and 4).

    All None for a group without a reference or a usable rubric.
    """
    rubrics = await _rubrics(references, engines.anchor, config)
    verdicts = await _verdicts(groups, rubrics, engines.judge, config)
    frac, is_soft = config.reward.min_judged_frac, config.reward.soft_verdicts
    return [
        PartReward(tuple(rubric_reward(given, frac, is_soft) for given in rows), rubric, tuple(rows))
        for rubric, rows in zip(rubrics, verdicts, strict=True)
    ]


async def propose_rubrics(texts: Sequence[str], anchor: Engine, config: Config) -> list[Rubric | None]:
    """One rubric per reference text, in order, from the text alone (CaT eq. 3).

    None where the answer was cut off, is not XML, or has fewer criteria than `min_criteria`.
    """
    prompts = [ask(render(config.prompts, "propose_rubric", reference=text)) for text in texts]
    sampling = Sampling(max_tokens=config.reward.rubric_max_tokens, temperature=0.0)
    rubrics = []
    for generation in await anchor.generate(prompts, sampling):
        rubric = parse_rubric(generation.completions[0].text)
        usable = rubric is not None and len(rubric.criteria) >= config.reward.min_criteria
        rubrics.append(Rubric(rubric.criteria[: config.reward.max_criteria]) if rubric and usable else None)
    return rubrics


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


async def _rubrics(references: Sequence[Reference], anchor: Engine, config: Config) -> list[Rubric | None]:
    """One per reference; None where there is no text, or nothing usable came."""
    texts = {i: reference.text for i, reference in enumerate(references) if reference.text is not None}
    proposed = await propose_rubrics(list(texts.values()), anchor, config) if texts else []
    by_index = dict(zip(texts, proposed, strict=True))
    return [by_index.get(i) for i in range(len(references))]


async def _verdicts(
    groups: Sequence[Group], rubrics: Sequence[Rubric | None], judge: Engine, config: Config
) -> list[list[tuple[Verdict, ...]]]:
    """Per group and rollout, one verdict per criterion; all asked at once, in the rubric's order."""
    questions = [
        (rollout.text, criterion)
        for group, rubric in zip(groups, rubrics, strict=True)
        if rubric is not None
        for rollout in group.rollouts
        for criterion in rubric.criteria
    ]
    answers = iter(await judge_criteria(questions, judge, config) if questions else [])
    return [
        [tuple(next(answers) for _ in (rubric.criteria if rubric else ())) for _ in group.rollouts]
        for group, rubric in zip(groups, rubrics, strict=True)
    ]
