"""What people said of references: every line is kept, the last word counts."""

from math import sqrt
from pathlib import Path

import pytest

from cat_grpo.errors import BadInput
from cat_grpo.report.reviews import Review, accuracy, append_review, latest, read_reviews, wrong_problems


def review(opinion, step=0, group=0, problem_id="p", note="") -> Review:
    return Review("2026-01-01T00:00:00+00:00", "Ada", step, group, problem_id, opinion, note)


def test_reviews_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "reviews.jsonl"
    assert read_reviews(path) == []
    said = [review("right", note="two\nlines \u2028 é"), review("wrong", group=1), review("unsure")]
    for one in said:
        append_review(path, one)
    assert read_reviews(path) == said


def test_the_last_word_on_a_reference_counts():
    said = [review("right"), review("wrong", group=1), review("wrong")]
    assert latest(said) == {(0, 0): said[2], (0, 1): said[1]}
    assert accuracy(said).wrong == 2


def test_accuracy_by_hand():
    # Three of four decided are right: p = 3/4, its standard error sqrt(3/4 * 1/4 / 4) = sqrt(3) / 8.
    said = [
        review(opinion, group=i) for i, opinion in enumerate(("right", "right", "right", "wrong", "unsure"))
    ]
    found = accuracy(said)
    assert (found.right, found.wrong, found.unsure) == (3, 1, 1)
    assert found.mean == 3 / 4
    assert found.standard_error == pytest.approx(sqrt(3) / 8)


def test_nothing_decided_is_no_accuracy():
    assert accuracy([]).mean is None
    assert accuracy([review("unsure")]).standard_error is None


def test_a_problem_is_wrong_by_its_last_review_in_any_step():
    said = [review("wrong", 0, 0, "a"), review("wrong", 0, 1, "b"), review("right", 5, 7, "a")]
    assert wrong_problems(said) == {"b"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not a review"),
        ('{"step": 1}', "not a review"),
        (
            '{"time": "", "name": "", "step": 0, "group": 0, "problem_id": "", "opinion": "good"}',
            "opinion: expected right, wrong or unsure, got 'good'",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, told: str):
    path = tmp_path / "reviews.jsonl"
    append_review(path, review("right"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match=rf"reviews\.jsonl:2: {told}"):
        read_reviews(path)
