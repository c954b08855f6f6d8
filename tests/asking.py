"""What the tests of engines ask, and how they look at the answers."""

import random
from collections.abc import Sequence

from cat_grpo.engines import Sampling
from cat_grpo.lab.corpus import draw_size, judge_label
from cat_grpo.lab.problems import care_question, sums_question
from cat_grpo.method.prompts import render
from cat_grpo.records import Completion, Generation, Messages

SUMS = [
    render("lab", "solve_verifiable", question=sums_question(pairs))
    for pairs in (
        ((23, 48), (60, 52), (11, 12), (59, 59)),
        ((10, 10), (37, 45), (28, 19), (33, 34)),
        ((51, 26),),
    )
]
CARE = render("lab", "solve_open", question=care_question(["cough", "sunburn", "dizziness"]))
PROMPTS = [CARE, *SUMS]
"""Of several lengths, and not in the order of them: an engine that batches by length must put them back."""


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


TURNS = [user(prompt) for prompt in PROMPTS]


def judge_turns(num: int) -> list[Messages]:
    """What the judge of a run is asked: one criterion on one note."""
    rngs = [random.Random(f"judge {i}") for i in range(num)]
    return [user(judge_label(rng, draw_size(rng, 1.0))[0][0]) for rng in rngs]


def ids_of(generations: Sequence[Generation]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in g.completions] for g in generations]


def completions_of(generations: Sequence[Generation]) -> list[Completion]:
    return [completion for generation in generations for completion in generation.completions]


SEEDS = (11, 12, 13, 14)
DRAW = Sampling(max_tokens=24, n=3, seeds=SEEDS)

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The lab model's linear layers but its head."""
