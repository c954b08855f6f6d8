r"""Final answers are read from `\boxed{...}`, compared and counted."""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cat_grpo.config import Equivalence
from cat_grpo.method.equivalence import equal_text, equivalent
from cat_grpo.records import Group, Reference

_TOKEN = re.compile(r"(?P<box>\\+boxed\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vote:
    """The most frequent answer of a group."""

    answer: str | None
    """None when no rollout had an answer."""
    num_votes: int
    tied: bool
    """Another answer has as many votes; `answer` is the one that came first."""


def extract_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}`; None when there is none or it is empty.

    A box that is never closed, as in a text that was cut off, is passed over: the one before it counts.
    """
    opened: list[int | None] = []  # of each open brace: where the content begins if it is a box's
    last, answer = -1, ""
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and start > last:
                last, answer = start, text[start : token.start()].strip()
    return answer or None


def rollout_answers(group: Group) -> list[str | None]:
    """The final answer of each rollout: None where there is none, or the rollout was cut off before it."""
    if not group.problem.has_final_answer:
        return [None] * len(group.rollouts)
    return [extract_answer(r.text) if r.finish_reason == "stop" else None for r in group.rollouts]


def same_answer(mode: Equivalence) -> Callable[[str, str], bool]:
    """The comparison that `reward.equivalence` names."""
    return {"math": equivalent, "string": equal_text}[mode]


def clusters(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[list[int]]:
    """Indices of equal answers, the largest class first and ties by first appearance. None is in no class.

    An answer joins the first class whose first member it equals: `same` need not be transitive.
    """
    classes: list[tuple[str, list[int]]] = []
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        members = next((members for first, members in classes if same(first, answer)), None)
        if members is None:
            classes.append((answer, [i]))
        else:
            members.append(i)
    return sorted((members for _, members in classes), key=len, reverse=True)


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> Vote:
    """Counts votes over equivalence classes. What was not parsed does not vote."""
    classes = clusters(answers, same)
    if not classes:
        return Vote(None, 0, False)
    num_votes = len(classes[0])
    tied = len(classes) > 1 and len(classes[1]) == num_votes
    return Vote(answers[classes[0][0]], num_votes, tied)


async def votes_of(groups: Sequence[Group], equivalence: Equivalence) -> list[Vote]:
    """Counts the votes of all groups at once, off the event loop: a comparison may ask another process."""
    same = same_answer(equivalence)
    return await asyncio.gather(
        *(asyncio.to_thread(majority, rollout_answers(group), same) for group in groups)
    )


async def agreements(
    groups: Sequence[Group], references: Sequence[Reference], equivalence: Equivalence
) -> list[list[bool | None]]:
    """Returns whether each rollout's final answer equals its reference's; None where there is none.

    A rollout without an answer agrees with nothing.
    """
    same = same_answer(equivalence)

    def row(group: Group, reference: Reference) -> list[bool | None]:
        expected = reference.answer
        if expected is None:
            return [None] * len(group.rollouts)
        return [answer is not None and same(answer, expected) for answer in rollout_answers(group)]

    pairs = zip(groups, references, strict=True)
    return await asyncio.gather(*(asyncio.to_thread(row, *pair) for pair in pairs))
