"""The only reader of gold answers measures how good a policy and its references are on labelled problems."""

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cat_grpo.config import Config, DataConfig, ModelConfig
from cat_grpo.data import read_rows, to_problem
from cat_grpo.engines import Engines
from cat_grpo.errors import BadInput
from cat_grpo.files import seed_of
from cat_grpo.method import cat
from cat_grpo.method.answers import majority, rollout_answers, same_answer
from cat_grpo.metrics import mean
from cat_grpo.models import read_card
from cat_grpo.records import Group, Kind, Problem, Reference, kinds_of
from cat_grpo.shipped import shipped

Samples = dict[str, list[float]]
"""One value per problem, by metric."""
Measured = tuple["LabelledProblem", Group, Reference, int]
"""A problem with its gold, what was made of it, and its seed."""


@dataclass(frozen=True, slots=True)
class LabelledProblem:
    """A problem with its gold: an `answer` (verifiable) or the `points` that a good text makes (open)."""

    problem: Problem
    answer: str | None
    points: tuple[str, ...]


def load_labelled(path: Path, limit: int | None = None) -> list[LabelledProblem]:
    """Reads at most `limit` rows `id, prompt, kind, answer | points`. BadInput names file and line.

    `lab:verifiable` and `lab:open` are the held-out files that ship with cat_grpo.
    """
    family = str(path).removeprefix("lab:")
    if str(path) != family and family in get_args(Kind):
        path = shipped("data", "lab", family, "heldout.jsonl")
    labelled = [_labelled(location, row) for location, row in read_rows(path, None)]
    return labelled[:limit]


async def evaluate(
    config: Config,
    problems: Path,
    model: str | None = None,
    anchor: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    secrets: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Returns the figures of `measure` for a model, by default the config's, on a labelled file.

    The anchor is by default what a checkpoint of ours was trained with, else the model itself.
    """
    from cat_grpo.engines.roles import open_engines  # loads torch

    labelled = load_labelled(problems, limit)
    kinds = kinds_of(item.problem for item in labelled)
    cat.refuse_unusable(config, kinds)
    model = model or config.model.path
    trained_with: str = anchor or read_card(model).get("anchor", model)
    policy = _at_path(config.model, model)
    frozen = _at_path(config.anchor or config.model, trained_with)
    engines = Engines(*await open_engines([policy, frozen, config.judge or frozen], secrets or {}))
    try:
        await cat.refuse_unfit(engines, config, kinds)
        return await measure(labelled, engines, config, seed)
    finally:
        await engines.close()


async def measure(
    labelled: Sequence[LabelledProblem], engines: Engines, config: Config, seed: int = 0
) -> dict[str, float]:
    """Returns means over problems, each with its standard error `<name>_se`, at training temperature.

    Verifiable: pass@1, maj@G, pass@G, reference_accuracy (without a reference: wrong),
    reference_right_all_wrong. Open: points_f1, reference_points_f1, rubric_reward. A figure that no
    problem counts for is left out.
    """
    problems = [item.problem for item in labelled]
    seeds = [seed_of(seed, 0, "evaluate", problem.id) for problem in problems]
    groups = await cat.explore(problems, engines, config, seeds)
    references = await cat.estimate(groups, engines, config, seeds)
    rows = list(zip(labelled, groups, references, seeds, strict=True))
    with_answer = [row for row in rows if row[0].problem.has_final_answer]
    with_points = [row for row in rows if not row[0].problem.has_final_answer]
    samples: Samples = {}
    if with_answer:  # off the event loop: a comparison may ask another process
        samples |= await asyncio.to_thread(_answer_samples, with_answer, config)
    if with_points:
        samples |= await _points_samples(with_points, engines, config)
    figures = {
        name: figure
        for key, values in samples.items()
        if values
        for name, figure in _mean_and_error(key, values)
    }
    return {"num_problems": float(len(labelled)), **figures}


def points_f1(text: str, points: Sequence[str]) -> float:
    """F1 of the needed points: recall over the points, precision over the text's sentences.

    A sentence that makes no needed point, or one that was made before, costs precision.
    """
    sentences = [sentence for sentence in re.split(r"[.!?\n]+", text.lower()) if sentence.strip()]
    made = {point for point in points if any(point.lower() in sentence for sentence in sentences)}
    if not made:
        return 0.0
    precision, recall = min(1.0, len(made) / len(sentences)), len(made) / len(points)
    return 2 * precision * recall / (precision + recall)


def _answer_samples(rows: Sequence[Measured], config: Config) -> Samples:
    same = same_answer(config.reward.equivalence)
    size = config.rollout.group_size
    names = (
        "pass@1",
        f"maj@{size}",
        f"pass@{size}",
        "reference_accuracy",
        "reference_right_all_wrong",
    )
    samples: Samples = {name: [] for name in names}
    for item, group, reference, _ in rows:
        gold = item.answer or ""
        answers = rollout_answers(group)
        right = [answer is not None and same(answer, gold) for answer in answers]
        vote = majority(answers, same).answer
        reference_right = reference.answer is not None and same(reference.answer, gold)
        figures = (
            mean(right),
            vote is not None and same(vote, gold),
            any(right),
            reference_right,
            reference_right and not any(right),
        )
        for name, figure in zip(names, figures, strict=True):
            samples[name].append(float(figure))
    return samples


async def _points_samples(rows: Sequence[Measured], engines: Engines, config: Config) -> Samples:
    labelled, groups, references, seeds = (list(column) for column in zip(*rows, strict=True))
    rewarded = await cat.derive(groups, references, engines, config, seeds)
    rewards = [[one.reward for one in group.rewards if one.reward is not None] for group in rewarded]
    return {
        "points_f1": [
            mean(points_f1(rollout.text, item.points) for rollout in group.rollouts)
            for item, group in zip(labelled, groups, strict=True)
        ],
        "reference_points_f1": [
            points_f1(reference.text or "", item.points)
            for item, reference in zip(labelled, references, strict=True)
        ],
        "rubric_reward": [mean(group_rewards) for group_rewards in rewards if group_rewards],
    }


def _mean_and_error(name: str, values: Sequence[float]) -> list[tuple[str, float]]:
    """The mean and its standard error: sample standard deviation over the root of the count."""
    centre = mean(values)
    spread = sum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)
    return [(name, centre), (f"{name}_se", math.sqrt(spread / len(values)))]


def _at_path(config: ModelConfig, path: str) -> ModelConfig:
    """The same engine for the model at `path`. BadInput where its servers have another's name."""
    if config.engine == "openai" and config.server.model and path != config.path:
        raise BadInput(f"server.model: {config.server.model} cannot stand for {path}, too: leave it empty")
    return config.model_copy(update={"path": path})


def _labelled(location: str, row: Mapping) -> LabelledProblem:
    problem = to_problem(location, dict(row), DataConfig())
    if problem.has_final_answer:
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise BadInput(f"{location}: answer: a verifiable problem needs its gold answer as text")
        return LabelledProblem(problem, answer, ())
    points = _points(row.get("points"))
    if not points:
        raise BadInput(
            f"{location}: points: an open problem needs a list of the points that a good text makes"
        )
    return LabelledProblem(problem, None, points)


def _points(value: object) -> tuple[str, ...]:
    """The points of a list, or of the JSON in a cell of a csv table; none when it is anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return ()
    if not isinstance(value, list) or not all(isinstance(point, str) and point.strip() for point in value):
        return ()
    return tuple(value)
