"""The data of the lab's base model: (prompt, completion) pairs for its four jobs, made on the fly.

Solving is shown with slips, so that the base model knows the task and is noisy at it. Synthesis, rubrics
and judging are shown without slips, because they must be reliable and unbiased. Synthesis data is made of
random values and random points, never of a solvable question, so the anchor learns to read rollouts and not
to solve again. An anchor that solves again would teach its own systematic mistakes.

The rows of one batch share their size, so that little of it is padding.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cat_grpo.lab import problems as lab
from cat_grpo.method.prompts import render

PROMPT_SET = "lab"
TEMPLATES = (
    "solve_verifiable",
    "solve_open",
    "synthesize_verifiable",
    "synthesize_open",
    "propose_rubric",
    "judge_label",
    "judge_xml",
)
"""The templates that the base model learns to answer."""
SLIP_RATE = 0.28
"""How often a solving demonstration gets one sum wrong."""
RIVAL_RATE = 0.3
"""How often a wrong value in a synthesis is one that other rollouts share, so that votes must be counted."""
READ_VALUES = range(20, 79)
"""The values that a rollout may answer. They range wider than sums do, so the anchor must read them."""
KEEP_RATE = 0.72
"""How often a solving demonstration makes a needed point."""
STRAY_RATES = (0.45, 0.35, 0.15, 0.05)
"""How often such a demonstration makes 0, 1, 2 or 3 points that nobody needs."""
REPEATS = (0, 0, 0, 1, 2, 4)
"""How many times a note in a synthesis repeats a point, because policies do so. A repeat is no vote."""
QUORUM = 1 / 4
"""The share of the notes that must make a point for the synthesis to make it."""
JUDGE_TURNS = 6
OPENERS = ("First", "Also", "Then", "Please", "At home")

Dialogue = list[tuple[str, str]]
"""(what the user says, what the model answers), turn by turn."""


@dataclass(frozen=True, slots=True)
class Size:
    """How long the texts of one batch are."""

    group: int
    """Rollouts in a synthesis."""
    points: int
    """Most points in a note or a rubric."""


Job = Callable[[random.Random, Size], Dialogue]


def draw_size(rng: random.Random, reach: float) -> Size:
    """Draws groups of 1 to 16 rollouts, notes of up to 10 points, less while `reach` in (0, 1] is small."""
    group = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 12, 16))
    points = rng.choice((4, 6, 8, 10))
    return Size(max(1, round(group * reach)), max(2, round(points * reach)))


def boxed(values: Sequence[int]) -> str:
    """A rollout of the verifiable family."""
    return rf"The sums are \boxed{{{lab.sums_answer(values)}}}."


def note(points: Sequence[str], rng: random.Random) -> str:
    """A rollout of the open family: one plain sentence per point, each with a random opener."""
    return " ".join(f"{rng.choice(OPENERS)}, {point}." for point in points)


def reference_note(points: Sequence[str]) -> str:
    """A reference of the open family: the same, with fixed openers."""
    return " ".join(f"{OPENERS[i > 0]}, {point}." for i, point in enumerate(points))


def rubric_xml(points: Sequence[str]) -> str:
    """The rubric that a reference with these points deserves."""
    criteria = "".join(f"<criterion>The note says: {point}.</criterion>" for point in points)
    return f"<rubric>{criteria}</rubric>"


def slip(value: int, rng: random.Random) -> int:
    """The value, or with probability SLIP_RATE any other."""
    if rng.random() >= SLIP_RATE:
        return value
    return rng.choice([other for other in READ_VALUES if other != value])


def solve_verifiable(rng: random.Random, size: Size) -> Dialogue:
    """A question and its sums, each wrong independently of the others."""
    pairs = lab.draw_pairs(rng, held_out=False)
    values = [slip(a + b, rng) for a, b in pairs]
    return [(render(PROMPT_SET, "solve_verifiable", question=lab.sums_question(pairs)), boxed(values))]


def solve_open(rng: random.Random, size: Size) -> Dialogue:
    """A question and a note: most needed points, once each, complaint by complaint, with strays between."""
    complaints = lab.draw_complaints(rng, held_out=False)
    points = []
    for complaint in complaints:
        points += [point for point in lab.CARE[complaint] if rng.random() < KEEP_RATE]
    strays = rng.choices(range(len(STRAY_RATES)), STRAY_RATES)[0]
    for point in rng.sample(sorted(set(lab.POINTS) - set(lab.needed_points(complaints))), strays):
        points.insert(rng.randint(0, len(points)), point)
    points = points or [lab.CARE[complaints[0]][0]]
    return [(render(PROMPT_SET, "solve_open", question=lab.care_question(complaints)), note(points, rng))]


def synthesize_verifiable(rng: random.Random, size: Size) -> Dialogue:
    """Rollouts that disagree sum by sum; the answer has the most frequent value of each sum."""
    rate = rng.uniform(0.0, 0.6)
    truth, rivals = ([rng.choice(READ_VALUES) for _ in range(lab.NUM_SUMS)] for _ in range(2))
    rollouts = []
    for _ in range(size.group):
        wrong = [rival if rng.random() < RIVAL_RATE else rng.choice(READ_VALUES) for rival in rivals]
        rollouts.append([w if rng.random() < rate else t for t, w in zip(truth, wrong, strict=True)])
    texts = [boxed(values) for values in rollouts]
    if len(texts) > 3 and rng.random() < 0.1:  # a broken rollout is no vote
        texts[rng.randrange(len(texts))] = boxed(truth)[: rng.randint(4, 24)]
        rollouts = [values for values, text in zip(rollouts, texts, strict=True) if text.endswith("}.")]
    answer = [_mode(column, rng) for column in zip(*rollouts, strict=True)]
    return [(render(PROMPT_SET, "synthesize_verifiable", question="", rollouts=texts), boxed(answer))]


def synthesize_open(rng: random.Random, size: Size) -> Dialogue:
    """Notes that overlap; the answer has the points that enough of them make."""
    core = rng.sample(lab.POINTS, rng.randint(2, size.points))
    others = sorted(set(lab.POINTS) - set(core))
    keep = min(1.0, rng.uniform(0.5, 1.15))  # now and then the notes agree on all of it
    stray = rng.choice((0.5, 1.0, 2.0, 4.0)) / len(others)
    in_one_order = rng.random() < 0.5
    notes = []
    for _ in range(size.group):
        points = [point for point in core if rng.random() < keep]
        for point in [point for point in others if rng.random() < stray]:
            points.insert(rng.randint(0, len(points)), point)
        points = points or core[:1]
        if not in_one_order:
            rng.shuffle(points)
        for again in rng.choices(points, k=rng.choice(REPEATS)):
            points.insert(rng.randint(0, len(points)), again)
        notes.append(points)
    counts = Counter(point for points in notes for point in set(points))
    agreed = [point for point in lab.POINTS if counts[point] >= QUORUM * len(notes)]
    agreed = agreed or [max(counts, key=lambda point: (counts[point], point))]
    texts = [note(points, rng) for points in notes]
    return [(render(PROMPT_SET, "synthesize_open", question="", rollouts=texts), reference_note(agreed))]


def propose_rubric(rng: random.Random, size: Size) -> Dialogue:
    """A random reference, and one criterion for each of its points, in the reference's order."""
    points = rng.sample(lab.POINTS, rng.randint(2, size.points))
    return [(render(PROMPT_SET, "propose_rubric", reference=note(points, rng)), rubric_xml(points))]


def judge_label(rng: random.Random, size: Size) -> Dialogue:
    """Criteria on one note, half of them satisfied. A run asks its judge only as the first turn does."""
    return _judgements(rng, size, "judge_label", ("yes", "no"))


def judge_xml(rng: random.Random, size: Size) -> Dialogue:
    """The same, with the verdict written as XML."""
    return _judgements(rng, size, "judge_xml", ("<verdict>yes</verdict>", "<verdict>no</verdict>"))


def quote(rng: random.Random, size: Size) -> Dialogue:
    """The sentence that makes a point, or `no`. No run asks for it; it teaches finding, as a judge must."""
    points, text, asked = _asked_points(rng, size)
    sentences = dict(zip(points, (f"{sentence}." for sentence in text.rstrip(".").split(". ")), strict=True))
    turns = [turn.replace("Answer yes or no.", "Quote.") for turn in _turns("judge_label", text, asked)]
    return [(turn, sentences.get(point, "no")) for turn, point in zip(turns, asked, strict=True)]


FIRST_JOBS: dict[Job, int] = {
    solve_open: 32,
    synthesize_verifiable: 16,
    propose_rubric: 8,
    judge_label: 24,
    quote: 24,
}
"""Rows of each job in an early training step, at groups of eight: mainly jobs where a point must be found."""
JOBS: dict[Job, int] = {
    solve_verifiable: 48,
    solve_open: 32,
    synthesize_verifiable: 12,
    synthesize_open: 24,
    propose_rubric: 8,
    judge_label: 16,
    judge_xml: 4,
    quote: 4,
}
"""The same for later steps."""


def sized_rows(job: Job, rows: int, size: Size) -> int:
    """Returns fewer rows for larger groups, so that a step costs about the same whatever its size."""
    return rows * 8 // max(4, size.group) if job in (synthesize_verifiable, synthesize_open) else rows


def _judgements(rng: random.Random, size: Size, template: str, answers: tuple[str, str]) -> Dialogue:
    points, text, asked = _asked_points(rng, size)
    turns = _turns(template, text, asked)
    return [(turn, answers[point not in points]) for turn, point in zip(turns, asked, strict=True)]


def _asked_points(rng: random.Random, size: Size) -> tuple[list[str], str, list[str]]:
    """The points of a note, its text, and the points to ask about: the note makes half of them."""
    complaints = rng.sample(list(lab.CARE), 4)
    pool = list(dict.fromkeys(lab.needed_points(complaints) + rng.sample(lab.POINTS, 4)))
    points = rng.sample(pool, rng.randint(1, min(size.points, 8)))
    text = note(points, rng)
    asked = []
    for _ in range(JUDGE_TURNS):
        satisfied = rng.random() < 0.5
        # A near miss comes from the same complaints: the judge must read the point, not the topic.
        near = [point for point in pool if point not in points] if rng.random() < 0.5 else []
        # The note may make all points of the pool. Then no near miss is left.
        missing = near or [point for point in lab.POINTS if point not in points]
        asked.append(rng.choice(points if satisfied else missing))
    return points, text, asked


def _turns(template: str, text: str, points: Sequence[str]) -> list[str]:
    """One prompt per point. The first contains the note; each later one only asks for another point."""
    prompts = [
        render(PROMPT_SET, template, rollout=text, criterion=f"The note says: {point}.") for point in points
    ]
    return [prompts[0], *(prompt[prompt.index("<criterion>") :] for prompt in prompts[1:])]


def _mode(values: Sequence[int], rng: random.Random) -> int:
    counts = Counter(values)
    most = max(counts.values())
    return rng.choice([value for value, count in counts.items() if count == most])
