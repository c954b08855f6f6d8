"""Which problems a step takes: a function of the run's seed, the step, and how the data has changed so far.

Data may grow and shrink between one start of a run and the next. The run records what came and what left,
with the first step that it counts for. Steps that were begun keep their problems.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_grpo.records import Problem


@dataclass(frozen=True, slots=True)
class Change:
    """The ids of the problems that came into the data and that left it, ahead of a step."""

    step: int
    came: tuple[str, ...]
    left: tuple[str, ...] = ()


def changes_with(changes: Sequence[Change], ids: Sequence[str], step: int) -> tuple[Change, ...]:
    """Adds the change, if any, that makes `ids` of the data from `step` on."""
    present = _present(changes)
    came = tuple(name for name in ids if name not in present)
    wanted = set(ids)
    left = tuple(name for name in present if name not in wanted)
    return (*changes, Change(step, came, left)) if came or left else tuple(changes)


class ProblemOrder:
    """Which problems each step takes: epochs of the whole data, one after another, each in its own order.

    Problems that come amid an epoch are taken at its end.
    """

    def __init__(self, changes: Sequence[Change], num_problems: int, seed: int) -> None:
        """`num_problems` are those of one step."""
        self._arguments = changes, num_problems, seed
        self._step, self._ids = -1, []
        self._drawn = _draw(*self._arguments)

    def ids_of(self, step: int) -> list[str]:
        """The ids of the step's problems. Steps in order cost the same each; an earlier one draws anew."""
        if step < self._step:
            self.__init__(*self._arguments)
        while self._step < step:
            self._ids = next(self._drawn)
            self._step += 1
        return self._ids


def _draw(changes: Sequence[Change], num_problems: int, seed: int) -> Iterator[list[str]]:
    """The ids of each step, from step 0 on."""
    coming = deque(enumerate(changes))
    known: list[str] = []
    queue: deque[str] = deque()
    """The rest of the epoch."""
    epoch = step = 0
    while True:
        while coming and coming[0][1].step == step:
            n, change = coming.popleft()
            left = set(change.left)
            known = [*(name for name in known if name not in left), *change.came]
            queue = deque(name for name in queue if name not in left)
            queue.extend(_shuffled(change.came, f"{seed} change {n}" if n else f"{seed} epoch 0"))
        taken: list[str] = []
        while len(taken) < num_problems:
            if not queue:
                epoch += 1
                queue.extend(_shuffled(known, f"{seed} epoch {epoch}"))
            taken.append(queue.popleft())
        yield taken
        step += 1


def _shuffled(ids: Sequence[str], seed: str) -> list[str]:
    return random.Random(seed).sample(ids, len(ids))


def rollout_keys(problems: Sequence[Problem]) -> list[str]:
    """Returns what seeds each problem's rollouts: its id, and a number too when it comes again in the step.

    With the id alone it would have the same rollouts again.
    """
    seen: Counter[str] = Counter()
    keys = []
    for problem in problems:
        keys.append(f"{problem.id} {seen[problem.id]}" if seen[problem.id] else problem.id)
        seen[problem.id] += 1
    return keys


def change_lines(changes: Iterable[Change]) -> str:
    """Returns the text that `read_changes` reads."""
    return "".join(
        json.dumps({"step": change.step, "came": change.came, "left": change.left}) + "\n"
        for change in changes
    )


def read_changes(path: Path) -> tuple[Change, ...]:
    """Returns the changes in a file; () when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    told = map(json.loads, lines)
    return tuple(Change(one["step"], tuple(one["came"]), tuple(one["left"])) for one in told)


def _present(changes: Sequence[Change]) -> dict[str, None]:
    """Returns the ids that are in the data, in the order in which they came."""
    present: dict[str, None] = {}
    for change in changes:
        for name in change.left:
            del present[name]
        present |= dict.fromkeys(change.came)
    return present
