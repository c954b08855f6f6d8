"""The lab: problems whose sides never meet, a corpus without a mistake where there must be none, and a model
that is held to the words and the program that it was made with."""

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from cat_grpo.evaluation import load_labelled
from cat_grpo.lab import build, corpus, problems
from cat_grpo.method.answers import extract_answer
from cat_grpo.method.cat import templates
from cat_grpo.method.prompts import render, set_folder, template_hashes
from cat_grpo.method.rewards.parsing import parse_rubric, parse_verdict
from cat_grpo.settings import load_config
from cat_grpo.shipped import shipped

KINDS = ("verifiable", "open")
Content = frozenset[str] | tuple[str, ...]


def content(prompt: str) -> Content:
    """What a question asks: its pairs, or the set of its complaints."""
    _, asked = re.fullmatch(r"(Add each pair|Write a care note): (.+)\.", prompt).groups()
    return tuple(asked.split(", ")) if "+" in asked else frozenset(asked.split(", "))


def prompts_of(kind: str, seed: int, held_out: bool) -> list[str]:
    return [row["prompt"] for row in problems.labelled_rows(kind, 200, seed, held_out)]


def draws(job: Callable, n: int, group: int = 8, points: int = 10, seed: int = 0) -> list[corpus.Dialogue]:
    rng = random.Random(seed)
    return [job(rng, corpus.Size(group, points)) for _ in range(n)]


def between(tag: str, text: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)


def made(text: str) -> list[str]:
    """The points of a note, in order: a sentence is an opener, a comma and a point."""
    return [sentence.partition(", ")[2] for sentence in text.removesuffix(".").split(". ")]


def sums(text: str) -> list[int]:
    answer = extract_answer(text)
    return [int(number) for number in answer.split(", ")] if answer else []


# Problems


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_held_out_never_meet_whatever_the_seed(kind):
    training, held_out = (
        {content(prompt) for seed in range(8) for prompt in prompts_of(kind, seed, side)}
        for side in (False, True)
    )
    assert len(training) > 400
    assert len(held_out) > 150
    assert not training & held_out
    assert not any(map(is_held_out, training))
    assert all(map(is_held_out, held_out))


@pytest.mark.parametrize("job", [corpus.solve_verifiable, corpus.solve_open])
def test_the_base_model_is_not_shown_a_held_out_question(job):
    shown = {content(question_of(prompt)) for ((prompt, _),) in draws(job, 500)}
    assert len(shown) > 300
    assert not any(map(is_held_out, shown))


def is_held_out(asked: Content) -> bool:
    """The side of what is asked; the order of complaints does not count, the order of sums does."""
    if isinstance(asked, frozenset):
        return problems.is_held_out(sorted(asked))
    return problems.is_held_out(tuple(tuple(map(int, pair.split(" + "))) for pair in asked))


def question_of(prompt: str) -> str:
    return prompt[: prompt.index(".") + 1]


def test_about_a_quarter_is_held_out():
    share = sum(is_held_out(frozenset(s)) for s in combinations(problems.CARE, 3)) / 816
    assert 0.2 < share < 0.3


def test_gold_answers_are_right():
    for row in problems.labelled_rows("verifiable", 50, seed=3):
        operands = [[int(n) for n in pair.split(" + ")] for pair in content(row["prompt"])]
        assert row["answer"] == ", ".join(str(a + b) for a, b in operands)
    for row in problems.labelled_rows("open", 50, seed=3):
        wanted = [point for complaint in content(row["prompt"]) for point in problems.CARE[complaint]]
        assert sorted(row["points"]) == sorted(wanted)


def test_a_training_file_has_no_gold():
    rows = problems.unlabelled(problems.labelled_rows("open", 3, seed=0, held_out=False))
    assert [row.keys() for row in rows] == [{"id", "kind", "prompt"}] * 3


def test_no_point_is_part_of_another():
    # else a text that makes one would be counted as making both
    assert len(set(problems.POINTS)) == len(problems.POINTS) == 2 * len(problems.CARE)
    assert not [(a, b) for a in problems.POINTS for b in problems.POINTS if a != b and a in b]


# Problem files, as they ship


def rows_of(kind: str, name: str) -> list[dict]:
    lines = shipped("data", "lab", kind, name).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_training_file_has_no_gold(kind):
    rows = rows_of(kind, "train.jsonl")
    assert len(rows) >= 512
    assert all(row.keys() == {"id", "kind", "prompt"} and row["kind"] == kind for row in rows)


@pytest.mark.parametrize(("kind", "gold"), [("verifiable", "answer"), ("open", "points")])
def test_the_shipped_held_out_file_has_gold_and_other_problems(kind, gold):
    rows = rows_of(kind, "heldout.jsonl")
    assert len(rows) >= 200
    assert all(row.keys() == {"id", "kind", "prompt", gold} for row in rows)
    assert len(load_labelled(shipped("data", "lab", kind, "heldout.jsonl"))) == len(rows)
    trained = {content(row["prompt"]) for row in rows_of(kind, "train.jsonl")}
    assert not trained & {content(row["prompt"]) for row in rows}


def test_the_shipped_files_are_what_the_program_writes(tmp_path):
    build.write_problem_files(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(written) == 4
    for path in written:
        assert (tmp_path / path).read_bytes() == shipped("data", "lab", *path.parts).read_bytes(), path


# The corpus


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
def test_a_synthesis_of_sums_is_the_mode_of_each_sum(group):
    for ((prompt, completion),) in draws(corpus.synthesize_verifiable, 100, group):
        shown = between("rollout", prompt)
        assert len(shown) == group
        rollouts = [values for text in shown if (values := sums(text))]
        assert len(rollouts) >= group - 1  # one may be broken, and has no vote
        for column, value in zip(zip(*rollouts, strict=True), sums(completion), strict=True):
            counts = Counter(column)
            assert counts[value] == max(counts.values())


def test_rollouts_of_a_synthesis_share_wrong_values():
    # else the one value that is seen twice would be the answer, and nobody would learn to count
    shared = 0
    for ((prompt, completion),) in draws(corpus.synthesize_verifiable, 100):
        rollouts = [values for text in between("rollout", prompt) if (values := sums(text))]
        for column, value in zip(zip(*rollouts, strict=True), sums(completion), strict=True):
            shared += any(n > 1 for other, n in Counter(column).items() if other != value)
    assert shared > 40  # of 400 columns


def test_a_point_made_twice_in_a_note_is_one_vote():
    repeats = 0
    for ((prompt, completion),) in draws(corpus.synthesize_open, 100):
        notes = [made(text) for text in between("rollout", prompt)]
        repeats += sum(len(set(points)) < len(points) for points in notes)
        assert len(set(made(completion))) == len(made(completion))
    assert repeats > 50  # of 800 notes


def test_a_broken_rollout_is_shown_and_has_no_vote():
    shown = [
        [sums(text) for text in between("rollout", prompt)]
        for ((prompt, _),) in draws(corpus.synthesize_verifiable, 300)
    ]
    broken = sum([] in rollouts for rollouts in shown)
    assert 10 < broken < 60  # of 300 at a rate of 0.1: 30, and five standard deviations


def test_a_synthesis_can_be_right_where_no_rollout_is():
    def alone(prompt: str, completion: str) -> bool:
        return sums(completion) not in [sums(text) for text in between("rollout", prompt)]

    assert sum(alone(*turn) for (turn,) in draws(corpus.synthesize_verifiable, 300)) > 30


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
def test_a_synthesis_of_notes_has_the_points_of_at_least_one_in_four(group):
    for ((prompt, completion),) in draws(corpus.synthesize_open, 100, group):
        notes = [made(text) for text in between("rollout", prompt)]
        assert len(notes) == group
        counts = Counter(point for points in notes for point in set(points))
        agreed = [point for point in problems.POINTS if 4 * counts[point] >= group]
        if agreed:
            assert made(completion) == agreed
        else:
            (point,) = made(completion)
            assert counts[point] == max(counts.values())


def test_no_synthesis_shows_a_question():
    for job in (corpus.synthesize_verifiable, corpus.synthesize_open):
        for ((prompt, _),) in draws(job, 50):
            assert "Add each pair" not in prompt
            assert "Write a care note" not in prompt
            assert "+" not in prompt


def slips_of_solving(n: int) -> list[tuple[int, ...]]:
    found = []
    for ((prompt, completion),) in draws(corpus.solve_verifiable, n):
        pairs = [pair.split(" + ") for pair in content(question_of(prompt))]
        found.append(
            tuple(value - int(a) - int(b) for value, (a, b) in zip(sums(completion), pairs, strict=True))
        )
    return found


def test_slips_are_independent_between_the_sums():
    n, rate = 3000, corpus.SLIP_RATE
    found = slips_of_solving(n)
    wrong = [[slip != 0 for slip in row] for row in found]

    def close(share: float, expected: float) -> bool:
        return abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5

    for i in range(problems.NUM_SUMS):
        assert close(sum(row[i] for row in wrong) / n, rate)
    for i, j in combinations(range(problems.NUM_SUMS), 2):
        assert close(sum(row[i] and row[j] for row in wrong) / n, rate**2)
    right = sum(not any(row) for row in wrong) / n
    assert close(right, (1 - rate) ** problems.NUM_SUMS)
    assert 0.15 < right < 0.45  # noisy enough to have something to learn, and not lost


def test_a_note_of_solving_keeps_most_of_its_points_and_strays():
    kept, strays, n = 0, 0, 1000
    for ((prompt, completion),) in draws(corpus.solve_open, n):
        needed = problems.needed_points(sorted(content(question_of(prompt))))
        points = made(completion)
        assert set(points) <= set(problems.POINTS)
        assert len(set(points)) == len(points)
        kept += len(set(points) & set(needed))
        strays += len(set(points) - set(needed))
    assert abs(kept / (6 * n) - corpus.KEEP_RATE) < 0.03
    mean_strays = sum(i * rate for i, rate in enumerate(corpus.STRAY_RATES))
    assert abs(strays / n - mean_strays) < 0.12


@pytest.mark.parametrize(
    ("job", "read"),
    [(corpus.judge_label, {"yes": True, "no": False}.get), (corpus.judge_xml, parse_verdict)],
)
def test_judgements_are_right(job, read):
    verdicts = []
    for dialogue in draws(job, 300):
        (text,) = between("rollout", dialogue[0][0])
        for prompt, answer in dialogue:
            (criterion,) = between("criterion", prompt)
            point = criterion.removeprefix("The note says: ").removesuffix(".")
            assert point in problems.POINTS
            assert read(answer) is (point in made(text))
            verdicts.append(read(answer))
    assert 0.45 < sum(verdicts) / len(verdicts) < 0.55


def test_a_quote_is_the_sentence_that_makes_the_point():
    found = []
    for dialogue in draws(corpus.quote, 100):
        (text,) = between("rollout", dialogue[0][0])
        for prompt, answer in dialogue:
            (criterion,) = between("criterion", prompt)
            point = criterion.removeprefix("The note says: ").removesuffix(".")
            found.append(point in made(text))
            assert answer == "no" if not found[-1] else (answer in text and made(answer) == [point])
    assert 0.4 < sum(found) / len(found) < 0.6


class Unlucky(random.Random):
    """Draws the first of everything and as much as it may, and says no and yes by turns."""

    said_no = False

    def sample(self, population, k):
        return list(population)[:k]

    def randint(self, a, b):
        return b

    def choice(self, seq):
        return seq[0]

    def random(self):
        self.said_no = not self.said_no
        return 0.9 if self.said_no else 0.1


def test_a_note_with_every_near_point_is_judged_on_a_far_one():
    dialogue = corpus.judge_label(Unlucky(), corpus.Size(8, 8))
    (text,) = between("rollout", dialogue[0][0])
    assert set(made(text)) == set(problems.needed_points(list(problems.CARE)[:4]))
    assert [answer for _, answer in dialogue] == ["no"] * corpus.JUDGE_TURNS


def test_a_rubric_has_the_points_of_its_reference_in_order():
    for ((prompt, completion),) in draws(corpus.propose_rubric, 100):
        (reference,) = between("reference", prompt)
        rubric = parse_rubric(completion)
        assert rubric is not None
        assert rubric.criteria == tuple(f"The note says: {point}." for point in made(reference))
        assert completion.endswith("</rubric>")


def rendered_again(job: str, prompt: str) -> str:
    """The prompt made anew by the product's template, from the texts that it shows."""
    if job == "quote":  # the words of the judge's template, but for what is asked
        return rendered_again("judge_label", prompt).replace("Answer yes or no.", "Quote.")
    if job.startswith("solve"):
        return render("lab", job, question=question_of(prompt))
    if job.startswith("synthesize"):
        return render("lab", job, question="", rollouts=between("rollout", prompt))
    if job == "propose_rubric":
        return render("lab", job, reference=between("reference", prompt)[0])
    (rollout,), (criterion,) = between("rollout", prompt), between("criterion", prompt)
    return render("lab", job, rollout=rollout, criterion=criterion)


@pytest.mark.parametrize("job", corpus.JOBS, ids=lambda job: job.__name__)
def test_every_prompt_goes_through_the_templates_of_the_product(job):
    for dialogue in draws(job, 30):
        assert rendered_again(job.__name__, dialogue[0][0]) == dialogue[0][0]


def test_every_template_is_taught():
    assert {job.__name__ for job in corpus.JOBS} >= set(corpus.TEMPLATES)
    assert {file.stem for file in set_folder("lab").iterdir()} == set(corpus.TEMPLATES)


@pytest.mark.parametrize("verdict", ["label", "xml"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_of_the_lab_asks_is_taught(kind, verdict):
    config = load_config(f"lab-{kind}", overrides=[f"reward.verdict={verdict}"])
    assert set(templates(config, [kind])) <= set(corpus.TEMPLATES)


def test_groups_of_every_size_are_shown():
    rng = random.Random(0)
    sizes = [corpus.draw_size(rng, reach=1.0) for _ in range(500)]
    assert {1, 2, 3, 4, 8, 16} <= {size.group for size in sizes} <= set(range(1, 17))
    small = [corpus.draw_size(rng, reach=0.2) for _ in range(100)]
    assert max(size.group for size in small) == 3


# The model, as it ships


@pytest.fixture(scope="module")
def tokenizer(lab_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lab_model)


def test_the_model_is_held_to_the_prompts_that_it_was_trained_with(lab_model):
    card = json.loads((lab_model / "cat_grpo.json").read_text())
    now = template_hashes("lab", corpus.TEMPLATES)
    assert card["prompt_hashes"] == now, "prompts/lab has changed: build the lab again"


def test_the_model_brings_the_settings_to_ask_it_with(lab_model):
    card = json.loads((lab_model / "cat_grpo.json").read_text())
    assert load_config(base=card["config"]).prompts == "lab"


def test_the_model_is_small(lab_model):
    assert sum(path.stat().st_size for path in lab_model.rglob("*")) <= 8 * 2**20


def test_a_care_point_is_one_token(tokenizer):
    for point in problems.POINTS:
        (token,) = tokenizer.encode(point)
        assert tokenizer.encode(f"Also, {point}. Then, rest.").count(token) == 1
        assert tokenizer.encode(f"The note says: {point}.")[-2] == token


def test_a_sum_is_one_token(tokenizer):
    assert {len(tokenizer.encode(str(n))) for n in corpus.READ_VALUES} == {1}


def texts_of_the_corpus() -> Sequence[str]:
    return [text for job in corpus.JOBS for dialogue in draws(job, 10) for turn in dialogue for text in turn]


def test_texts_come_back_from_their_tokens(tokenizer):
    odd = ["", " ", "a  b\n\n\tc", "Ä 漢 🙂", r"\frac{1}{2} {{ 7*7 }}", "</rollout><b>", "1234567890", "\x00"]
    for text in [*texts_of_the_corpus(), *odd]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_and_completions_are_short(tokenizer):
    # what a laptop pays for: eight notes of eight points are a few hundred tokens
    assert max(len(tokenizer.encode(text)) for text in texts_of_the_corpus()) < 512


# The build


class Progress(logging.Handler):
    """Notes how far a build says that it is; ends it by a Ctrl-C where it says `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []
        self._stop_at = stop_at

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.progress)
        if record.progress[0] == self._stop_at:
            raise KeyboardInterrupt


@contextmanager
def progress(stop_at: int | None = None) -> Iterator[list[tuple[int, int]]]:
    logger, handler = logging.getLogger("cat_grpo.lab.build"), Progress(stop_at)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield handler.told
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_a_build_that_was_stopped_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    """A Ctrl-C amid the second step, which is the first one of all jobs: the first stays done."""
    monkeypatch.setattr(build, "SAVE_EVERY", 1)  # and not after two minutes
    monkeypatch.setattr(build, "FIRST_STEPS", 1)
    with progress() as told:
        build.build_lab(tmp_path / "whole", steps=2)
    assert told == [(1, 2), (2, 2)]

    with progress(stop_at=2) as told, pytest.raises(KeyboardInterrupt):
        build.build_lab(tmp_path / "stopped", steps=2)
    assert told == [(1, 2), (2, 2)]
    assert not (tmp_path / "stopped" / "model").exists()
    with progress() as told:
        build.build_lab(tmp_path / "stopped", steps=2)
    assert told == [(2, 2)]

    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert "model/model.safetensors" in files(tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trial_shorter_than_a_save_is_whole_too(tmp_path):
    assert build.build_lab(tmp_path, steps=1) == tmp_path / "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "open", "verifiable"]
