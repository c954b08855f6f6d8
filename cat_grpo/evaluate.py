"""The only reader of gold answers: how good a policy and its references really are, on labelled problems."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cat_grpo.answers import extract_answer, majority, same_answer
from cat_grpo.config import Config, DataConfig
from cat_grpo.data import read_rows, to_problem
from cat_grpo.engines import Engines
from cat_grpo.metrics import mean
from cat_grpo.records import Group, Kind, Problem, Reference
from cat_grpo.references import estimate_references, rollout_answers
from cat_grpo.rewards import score_groups
from cat_grpo.rollouts import generate_rollouts
from cat_grpo.rundir import seed_of
from cat_grpo.shipped import shipped

Samples = dict[str, list[float]]
"""One value per problem, by metric."""


@dataclass(frozen=True, slots=True)
class LabelledProblem:
    """A problem with its gold: an `answer` (verifiable) or the `points` that a good text makes (open)."""

    problem: Problem
    answer: str | None
    points: tuple[str, ...]


def load_labelled(path: Path, limit: int | None = None) -> list[LabelledProblem]:
    """Rows `id, prompt, kind, answer | points` of a file, at most `limit`; ValueError with file and line.

    `lab:verifiable` and `lab:open` are the held-out files that ship with cat_grpo.
    """
    family = str(path).removeprefix("lab:")
    if str(path) != family and family in get_args(Kind):
        path = shipped("data", "lab", family, "heldout.jsonl")
    labelled = [_labelled(location, row) for location, row in read_rows(path, None)]
    return labelled[:limit]


async def evaluate(
    labelled: Sequence[LabelledProblem], engines: Engines, config: Config, seed: int = 0
) -> dict[str, float]:
    """Means over problems, each with its standard error `<name>_se`, at training temperature.

    Verifiable: pass@1, maj@G, pass@G, reference_accuracy (without a reference: wrong),
    reference_right_all_wrong. Open: points_f1, reference_points_f1, rubric_reward. A figure without a single
    problem to count is left out.
    """
    problems = [item.problem for item in labelled]
    seeds = [seed_of(seed, 0, "evaluate", problem.id) for problem in problems]
    groups = await generate_rollouts(problems, engines.policy, config.rollout, config.prompts, seeds)
    references = await estimate_references(
        groups, engines.anchor, config.reference, config.reward.equivalence, config.prompts, seeds
    )
    verifiable = [i for i, problem in enumerate(problems) if problem.kind == "verifiable"]
    open_ended = [i for i, problem in enumerate(problems) if problem.kind == "open"]
    samples: Samples = {}
    if verifiable:
        samples |= _verifiable_samples(*_chosen(verifiable, labelled, groups, references), config)
    if open_ended:
        samples |= await _open_samples(*_chosen(open_ended, labelled, groups, references), engines, config)
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


def _verifiable_samples(
    labelled: Sequence[LabelledProblem],
    groups: Sequence[Group],
    references: Sequence[Reference],
    config: Config,
) -> Samples:
    same = same_answer(config.reward.equivalence)
    size = config.rollout.group_size
    samples: Samples = {
        name: []
        for name in (
            "pass@1",
            f"maj@{size}",
            f"pass@{size}",
            "reference_accuracy",
            "reference_right_all_wrong",
        )
    }
    for item, group, reference in zip(labelled, groups, references, strict=True):
        gold = item.answer or ""
        answers = rollout_answers(group)
        right = [answer is not None and same(answer, gold) for answer in answers]
        vote = majority(answers, same).answer
        proposed = extract_answer(reference.text) if reference.text is not None else None
        reference_right = proposed is not None and same(proposed, gold)
        samples["pass@1"].append(mean(right))
        samples[f"maj@{size}"].append(float(vote is not None and same(vote, gold)))
        samples[f"pass@{size}"].append(float(any(right)))
        samples["reference_accuracy"].append(float(reference_right))
        samples["reference_right_all_wrong"].append(float(reference_right and not any(right)))
    return samples


async def _open_samples(
    labelled: Sequence[LabelledProblem],
    groups: Sequence[Group],
    references: Sequence[Reference],
    engines: Engines,
    config: Config,
) -> Samples:
    scored = await score_groups(
        groups, references, engines.anchor, engines.judge, config.reward, config.prompts
    )
    rewards = [[score.reward for score in group.scores if score.reward is not None] for group in scored]
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


def _chosen(
    indices: Sequence[int],
    labelled: Sequence[LabelledProblem],
    groups: Sequence[Group],
    references: Sequence[Reference],
) -> tuple[list[LabelledProblem], list[Group], list[Reference]]:
    return [labelled[i] for i in indices], [groups[i] for i in indices], [references[i] for i in indices]


def _mean_and_error(name: str, values: Sequence[float]) -> list[tuple[str, float]]:
    """The mean and its standard error: sample standard deviation over the root of the count."""
    centre = mean(values)
    spread = sum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)
    return [(name, centre), (f"{name}_se", math.sqrt(spread / len(values)))]


def _labelled(location: str, row: Mapping) -> LabelledProblem:
    problem = to_problem(location, dict(row), DataConfig())
    if problem.kind == "verifiable":
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{location}: answer: a verifiable problem needs its gold answer as text")
        return LabelledProblem(problem, answer, ())
    points = _points(row.get("points"))
    if not points:
        raise ValueError(
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
