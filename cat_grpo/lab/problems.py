"""The lab's two families of problems, written by a program that knows their answers.

*verifiable*: four sums in one question, boxed together. A rollout slips in one sum and not in another, so
a reader of several rollouts can be right where none of them was.
*open*: a care note for three complaints. Each complaint has two points that a good note makes; there is no
single right wording. The advice is a toy, not medicine.

A hash of its content puts a question on the training or the held-out side, so the two never overlap, whatever
the seed.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from cat_grpo.records import Kind

NUM_SUMS = 4
OPERANDS = (range(10, 40), (10, 20))
"""The numbers from which the left and the right side of a sum are drawn."""
CARE = {
    "cough": ("drink warm water", "use honey syrup"),
    "sore throat": ("gargle salt water", "rest the voice"),
    "fever": ("keep a cool room", "check the temperature"),
    "headache": ("dim the lights", "lower screen time"),
    "back pain": ("stretch each morning", "sit up straight"),
    "sprained ankle": ("wrap the ankle", "raise the foot"),
    "sunburn": ("spread aloe gel", "stay in shade"),
    "dry skin": ("choose mild soap", "apply thick cream"),
    "insomnia": ("skip late coffee", "set a bedtime"),
    "nausea": ("sip ginger tea", "nibble plain crackers"),
    "heartburn": ("avoid spicy food", "plan small meals"),
    "constipation": ("add more fibre", "take short walks"),
    "hay fever": ("close the windows", "rinse the nose"),
    "dizziness": ("stand up slowly", "hold the handrail"),
    "leg cramps": ("massage the calf", "eat a banana"),
    "eye strain": ("blink more often", "look far away"),
    "anxiety": ("breathe in deeply", "write a journal"),
    "bee sting": ("remove the stinger", "put on ice"),
}
POINTS = tuple(point for points in CARE.values() for point in points)
NUM_COMPLAINTS = 3
HELD_OUT_SHARE = 0.25


def sums_question(pairs: Sequence[tuple[int, int]]) -> str:
    """`Add each pair: 23 + 48, 60 + 52, ...` for the given operands."""
    return "Add each pair: " + ", ".join(f"{a} + {b}" for a, b in pairs) + "."


def sums_answer(sums: Sequence[int]) -> str:
    """The content of the box of a right rollout."""
    return ", ".join(map(str, sums))


def care_question(complaints: Sequence[str]) -> str:
    """`Write a care note: cough, sunburn, dizziness.` for the given complaints."""
    return "Write a care note: " + ", ".join(complaints) + "."


def needed_points(complaints: Sequence[str]) -> list[str]:
    """The points of a good note, complaint by complaint."""
    return [point for complaint in complaints for point in CARE[complaint]]


def is_held_out(content: object) -> bool:
    """Returns whether content (operand pairs; the set of complaints) is held out, the same on any machine."""
    digest = hashlib.sha256(repr(content).encode()).digest()
    return digest[0] / 256 < HELD_OUT_SHARE


def draw_pairs(rng: random.Random, held_out: bool) -> tuple[tuple[int, int], ...]:
    """Draws the operands of one verifiable problem of the asked side."""
    while True:
        pairs = tuple((rng.choice(OPERANDS[0]), rng.choice(OPERANDS[1])) for _ in range(NUM_SUMS))
        if is_held_out(pairs) == held_out:
            return pairs


def draw_complaints(rng: random.Random, held_out: bool) -> tuple[str, ...]:
    """Draws the complaints of one open problem of the asked side. Their order does not decide the side."""
    while True:
        complaints = tuple(rng.sample(list(CARE), NUM_COMPLAINTS))
        if is_held_out(sorted(complaints)) == held_out:
            return complaints


def _verifiable_row(rng: random.Random, held_out: bool) -> dict:
    pairs = draw_pairs(rng, held_out)
    return {"prompt": sums_question(pairs), "answer": sums_answer([a + b for a, b in pairs])}


def _open_row(rng: random.Random, held_out: bool) -> dict:
    complaints = draw_complaints(rng, held_out)
    return {"prompt": care_question(complaints), "points": needed_points(complaints)}


_ROWS: dict[Kind, Callable[[random.Random, bool], dict]] = {"verifiable": _verifiable_row, "open": _open_row}


def labelled_rows(kind: Kind, n: int, seed: int, held_out: bool = True) -> list[dict]:
    """`n` different problems with their gold answers, as rows of a labelled file."""
    rng = random.Random(f"{kind} {seed} {held_out}")
    rows: dict[str, dict] = {}
    while len(rows) < n:
        row = _ROWS[kind](rng, held_out)
        rows.setdefault(row["prompt"], row)
    return [{"id": f"{kind}-{seed}-{i:05d}", "kind": kind, **row} for i, row in enumerate(rows.values())]


def unlabelled(rows: Sequence[dict]) -> list[dict]:
    """The same rows without their gold columns: what a training file holds."""
    return [{key: row[key] for key in ("id", "kind", "prompt")} for row in rows]


def write_problems(rows: Sequence[dict], path: Path) -> None:
    """Writes the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
