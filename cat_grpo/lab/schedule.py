"""When the lab's base model learns what: its phases, its learning rate, the length of its texts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cat_grpo.lab import corpus
from cat_grpo.lab.problems import Operands

WARM_UP = 50
FULL_REACH = 600
"""The step from which on texts have their full length."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training with a learning rate and a mixture of its own."""

    first: int
    """Its first step."""
    peak_lr: float
    wave: int
    """Steps in which half a cosine takes the rate from its peak to a twentieth, were the phase that long."""
    rows: Mapping[corpus.Job, int]
    """Rows of a job, where it is not the corpus's own number."""
    style: Mapping[str, Any]
    """How its texts differ: fields of `corpus.Size`."""


WIDE: Operands = (range(10, 40), range(10, 40))
NARROW: Operands = (range(10, 25), range(10, 25))
EARLY = {"has_near_slips": True, "is_ordered": False, "is_worn": False, "quorum": 1 / 2}
NOTES = {
    corpus.solve_verifiable: 24,
    corpus.synthesize_verifiable: 6,
    corpus.synthesize_open: 32,
    corpus.judge_label: 12,
    corpus.propose_rubric: 8,
    corpus.quote: 2,
}
PHASES = (
    # First the words, the sums and copying; then, on a new wave, quoting, which teaches to find a point; and
    # once judging has begun to follow from it, judging above all.
    Phase(0, 3e-3, 1200, {corpus.quote: 0}, EARLY | {"operands": WIDE}),
    Phase(900, 1.5e-3, 600, {}, EARLY | {"operands": WIDE}),
    Phase(
        1200,
        1.5e-3,
        600,
        {corpus.judge_label: 32, corpus.quote: 24, corpus.solve_verifiable: 24, corpus.solve_open: 16},
        EARLY | {"operands": WIDE},
    ),
    # Then the sums that the problems ask for, and notes that a synthesis can be complete from.
    Phase(
        1500,
        1.5e-3,
        350,
        {corpus.solve_verifiable: 64, corpus.judge_label: 24, corpus.quote: 8},
        EARLY | {"operands": NARROW},
    ),
    Phase(
        1600,
        1.3e-3,
        400,
        {
            corpus.solve_verifiable: 64,
            corpus.solve_open: 48,
            corpus.synthesize_open: 20,
            corpus.judge_label: 12,
            corpus.propose_rubric: 8,
            corpus.quote: 0,
        },
        EARLY | {"operands": NARROW, "quorum": 3 / 8},
    ),
    Phase(
        1800,
        1.5e-3,
        500,
        {
            corpus.solve_verifiable: 64,
            corpus.synthesize_verifiable: 8,
            corpus.synthesize_open: 28,
            corpus.judge_label: 8,
            corpus.propose_rubric: 6,
            corpus.quote: 0,
        },
        {"is_worn": False, "quorum": 3 / 8},
    ),
    # Last, rollouts as they become while a policy is trained.
    Phase(
        2200,
        2e-3,
        450,
        {
            corpus.solve_verifiable: 64,
            corpus.solve_open: 24,
            corpus.synthesize_verifiable: 12,
            corpus.synthesize_open: 20,
            corpus.propose_rubric: 6,
            corpus.judge_label: 12,
            corpus.quote: 4,
        },
        {"quorum": 3 / 8},
    ),
    Phase(2650, 2e-3, 400, NOTES, {}),
    Phase(3050, 1.5e-3, 300, NOTES, {}),
)
STEPS = 3350


def phase_of(step: int) -> Phase:
    return max((phase for phase in PHASES if phase.first <= step), key=lambda phase: phase.first)


def learning_rate(step: int) -> float:
    """The phase's wave; the very first steps warm up."""
    phase = phase_of(step)
    begin = max(phase.first, WARM_UP)
    progress = max(0, step - begin) / (phase.first + phase.wave - begin)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return phase.peak_lr * min((step + 1) / WARM_UP, cosine)


def reach_at(step: int) -> float:
    """How long the texts may be, from a fifth of their full length on."""
    return min(1.0, 0.2 + 0.8 * step / FULL_REACH)
