"""Compute as Teacher without training: the reference is the answer."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa

from cat_grpo.config import Config
from cat_grpo.data import load_problems
from cat_grpo.engines import Engines, together
from cat_grpo.engines.roles import open_engines
from cat_grpo.errors import BadInput
from cat_grpo.files import seed_of, write_whole
from cat_grpo.method import cat
from cat_grpo.method.answers import same_answer
from cat_grpo.records import Group, Problem, Reference, kinds_of
from cat_grpo.run.observing import Observer, Telling
from cat_grpo.run.tables import Row, write_table

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Batches under way: while the last long rollouts of one end, the other keeps the engines busy."""
SUFFIXES = (".jsonl", ".parquet")
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),  # a chat of several turns as JSON, which the loader of problems reads too
        ("reference", pa.string()),
        ("answer", pa.string()),
        ("rollouts", pa.list_(pa.string())),
        ("majority", pa.string()),
        ("agrees", pa.bool_()),
    ]
)


async def synthesize(
    config: Config,
    out: Path,
    observer: Observer | None = None,
    secrets: Mapping[str, str] | None = None,
) -> list[Row]:
    """Writes a row per problem of the config's data to `out` (.jsonl or .parquet), and returns the rows.

    The policy is the config's model, and the anchor too, unless the config names one. A batch of as many
    problems as a step has is a stage `synthesize` to the observer. BadInput for another suffix, before
    any work.
    """
    refuse_suffix(out)
    problems = load_problems(config.data)
    cat.refuse_unusable(config, kinds_of(problems), with_rewards=False)
    policy, anchor = await open_engines([config.model, config.anchor or config.model], secrets or {})
    engines = Engines(policy, anchor, anchor)
    batches = _cut(problems, config.train.problems_per_step)
    room, num_done = asyncio.Semaphore(AT_ONCE), 0

    async def in_turn(number: int) -> list[Row]:
        nonlocal num_done
        async with room:
            with Telling(observer or Observer(), "synthesize", number).of_shard():
                shards = _cut(batches[number], config.shard_size)
                made = list(chain(*await together(_rows(shard, engines, config) for shard in shards)))
        num_done += len(made)
        done = (num_done, len(problems))
        log.info("%d of %d problems", *done, extra={"progress": done})
        return made

    try:
        rows = list(chain(*await together(in_turn(number) for number in range(len(batches)))))
    finally:
        await engines.close()
    await asyncio.to_thread(_write, out, rows)
    return rows


def refuse_suffix(out: Path) -> None:
    """BadInput for a file that is neither .jsonl nor .parquet."""
    if out.suffix not in SUFFIXES:
        raise BadInput(f"{out}: expected a name that ends in .jsonl or .parquet")


def _cut(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    return [problems[first : first + size] for first in range(0, len(problems), size)]


async def _rows(problems: Sequence[Problem], engines: Engines, config: Config) -> list[Row]:
    seeds = [seed_of(config.train.seed, 0, "synthesize", problem.id) for problem in problems]
    groups = await cat.explore(problems, engines, config, seeds)
    references = await cat.estimate(groups, engines, config, seeds)
    same = same_answer(config.reward.equivalence)
    # Off the event loop: a comparison may ask another process.
    return await asyncio.to_thread(
        lambda: [_row(group, reference, same) for group, reference in zip(groups, references, strict=True)]
    )


def _row(group: Group, reference: Reference, same: Callable[[str, str], bool]) -> Row:
    problem, answer, majority = group.problem, reference.answer, reference.majority
    return {
        "id": problem.id,
        "prompt": problem.question if len(problem.messages) == 1 else json.dumps(problem.messages),
        "reference": reference.text,
        "answer": answer,
        "rollouts": [rollout.text for rollout in group.rollouts],
        "majority": majority,
        "agrees": None if answer is None or majority is None else same(answer, majority),
    }


def _write(path: Path, rows: Sequence[Row]) -> None:
    if path.suffix == ".parquet":
        write_table(rows, COLUMNS, path)
    else:
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
