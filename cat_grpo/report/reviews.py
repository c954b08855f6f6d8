"""What people said of a run's references: `reviews.jsonl`, to which lines are only ever added.

The one measure of references where there are no gold answers.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from cat_grpo.errors import BadInput
from cat_grpo.files import append_line

REVIEWS = "reviews.jsonl"

Opinion = Literal["right", "wrong", "unsure"]


@dataclass(frozen=True, slots=True)
class Review:
    """One person on one reference."""

    time: str
    """UTC, in ISO 8601."""
    name: str
    step: int
    """As the step's folder counts, from 0."""
    group: int
    """Its position in the step, from 0: a problem may come twice in one."""
    problem_id: str
    opinion: Opinion
    note: str = ""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the reviewed references people hold for right; the unsure count on neither side."""

    right: int
    wrong: int
    unsure: int

    @property
    def mean(self) -> float | None:
        """None before anything was decided."""
        decided = self.right + self.wrong
        return self.right / decided if decided else None

    @property
    def standard_error(self) -> float | None:
        """sqrt(p (1 - p) / n), for references that were drawn at random. 0 where all are alike."""
        decided = self.right + self.wrong
        return math.sqrt(self.right * self.wrong / decided**3) if decided else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_review(path: Path, review: Review) -> None:
    """One line more. Several processes may write at once: a line is one write to the end of the file."""
    append_line(path, json.dumps(asdict(review), ensure_ascii=False))


def read_reviews(path: Path) -> list[Review]:
    """In the order of writing; none where there is no file. BadInput that says which line is wrong."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_review(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def latest(reviews: Iterable[Review]) -> dict[tuple[int, int], Review]:
    """By (step, group): the last word on each reference."""
    return {(review.step, review.group): review for review in reviews}


def accuracy(reviews: Iterable[Review]) -> Accuracy:
    """Of the references, each by the last word on it."""
    opinions = [review.opinion for review in latest(reviews).values()]
    return Accuracy(*(opinions.count(opinion) for opinion in get_args(Opinion)))


def wrong_problems(reviews: Iterable[Review]) -> set[str]:
    """The ids of problems whose reference was last found wrong, in whichever step it was."""
    last = {review.problem_id: review.opinion for review in reviews}
    return {problem_id for problem_id, opinion in last.items() if opinion == "wrong"}


def _review(line: str, where: str) -> Review:
    try:
        told: Any = json.loads(line)
        review = Review(**told)
    except (json.JSONDecodeError, TypeError) as error:
        raise BadInput(f"{where}: not a review: {error}") from error
    if review.opinion not in get_args(Opinion):
        raise BadInput(f"{where}: opinion: expected right, wrong or unsure, got {review.opinion!r}")
    return review
