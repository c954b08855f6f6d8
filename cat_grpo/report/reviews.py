"""People's reviews of a run's references, in `reviews.jsonl`. Lines are only ever added to it.

Without gold answers, reviews are the only measure of the references.
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
    """One person's opinion on one reference."""

    time: str
    """UTC, in ISO 8601."""
    name: str
    step: int
    """Counted from 0, as in the name of the step's folder."""
    group: int
    """Its position in the step, from 0, because a step may hold the same problem twice."""
    problem_id: str
    opinion: Opinion
    note: str = ""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the reviewed references people found right. Unsure ones count on neither side."""

    right: int
    wrong: int
    unsure: int

    @property
    def mean(self) -> float | None:
        """The share of right ones among those right or wrong; None when there are none."""
        decided = self.right + self.wrong
        return self.right / decided if decided else None

    @property
    def standard_error(self) -> float | None:
        """sqrt(p (1 - p) / n), for references drawn at random; 0 when all are alike, None without any."""
        decided = self.right + self.wrong
        return math.sqrt(self.right * self.wrong / decided**3) if decided else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_review(path: Path, review: Review) -> None:
    """Adds a line. Several processes may do so at once: each line is one write to the end of the file."""
    append_line(path, json.dumps(asdict(review), ensure_ascii=False))


def read_reviews(path: Path) -> list[Review]:
    """The reviews in the order of writing; none when there is no file. BadInput says which line is wrong."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_review(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def latest(reviews: Iterable[Review]) -> dict[tuple[int, int], Review]:
    """The last review of each reference, by (step, group)."""
    return {(review.step, review.group): review for review in reviews}


def accuracy(reviews: Iterable[Review]) -> Accuracy:
    """The accuracy of the references. Only the last review of each one counts."""
    opinions = [review.opinion for review in latest(reviews).values()]
    return Accuracy(*(opinions.count(opinion) for opinion in get_args(Opinion)))


def wrong_problems(reviews: Iterable[Review]) -> set[str]:
    """The ids of problems whose reference was last found wrong, in whichever step."""
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
