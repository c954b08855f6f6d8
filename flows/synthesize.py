"""Compute as Teacher without training: the reference is the answer. One task per step's worth of problems."""

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa
from prefect import flow, task
from prefect.artifacts import acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from cat_grpo.answers import extract_answer, same_answer
from cat_grpo.config import Config
from cat_grpo.data import load_problems
from cat_grpo.engines import Engines, together
from cat_grpo.engines.roles import open_engines
from cat_grpo.records import Group, Problem, Reference
from cat_grpo.references import estimate_references
from cat_grpo.report import table_rows
from cat_grpo.rollouts import generate_rollouts
from cat_grpo.rundir import seed_of
from cat_grpo.tables import Row, write_table
from flows.artifacts import artifact_key, publish
from flows.secrets import read_secrets

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Tasks under way: while the last long rollouts of one end, the other keeps the engines busy."""
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


@flow(name="synthesize", flow_run_name="{out}")
async def synthesize(config: Config, out: str) -> str:
    """A row per problem of the config's data, written to `out` (.jsonl or .parquet), which is returned.

    The policy is the config's model, and the anchor too, unless the config names one. ValueError for another
    suffix, before any work.

    Args:
        config: What is asked, and how.
        out: A .jsonl or .parquet file.
    """
    path = Path(out)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{out}: expected a name that ends in .jsonl or .parquet")
    problems = load_problems(config.data)
    batches = _cut(problems, config.train.problems_per_step)
    secrets = await read_secrets(config)
    policy, anchor = await open_engines([config.model, config.anchor or config.model], secrets)
    engines = Engines(policy, anchor, anchor)

    @task(task_run_name="synthesize-{batch:05d}", cache_policy=NO_CACHE, persist_result=False)
    async def synthesize_batch(batch: int) -> list[Row]:
        shards = _cut(batches[batch], config.shard_size)
        return list(chain(*await together(_rows(shard, engines, config) for shard in shards)))

    room, num_done = asyncio.Semaphore(AT_ONCE), 0

    async def in_turn(batch: int) -> list[Row]:
        nonlocal num_done
        async with room:
            made = await synthesize_batch(batch)
        num_done += len(made)
        done = (num_done, len(problems))
        log.info("%d of %d problems", *done, extra={"progress": done})
        return made

    try:
        rows = list(chain(*await together(in_turn(batch) for batch in range(len(batches)))))
    finally:
        await engines.close()
    await asyncio.to_thread(_write_whole, path, rows)
    shown = table_rows([{name: row[name] for name in row if name not in ("id", "rollouts")} for row in rows])
    about = f"{len(shown)} of {len(rows)} rows. In full: {out}"
    await publish(acreate_table_artifact(shown, f"{artifact_key(path.name)}-references", about))
    return out


def _cut(problems: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    return [problems[first : first + size] for first in range(0, len(problems), size)]


async def _rows(problems: Sequence[Problem], engines: Engines, config: Config) -> list[Row]:
    seeds = [seed_of(config.train.seed, 0, "synthesize", problem.id) for problem in problems]
    groups = await generate_rollouts(problems, engines.policy, config.rollout, config.prompts, seeds)
    references = await estimate_references(
        groups, engines.anchor, config.reference, config.reward.equivalence, config.prompts, seeds
    )
    # Off the event loop: a comparison may ask another process.
    return await asyncio.to_thread(
        lambda: [_row(group, reference, config) for group, reference in zip(groups, references, strict=True)]
    )


def _row(group: Group, reference: Reference, config: Config) -> Row:
    problem, is_open = group.problem, group.problem.kind == "open"
    answer = None if is_open or reference.text is None else extract_answer(reference.text)
    majority = None if is_open else reference.majority
    same = same_answer(config.reward.equivalence)
    return {
        "id": problem.id,
        "prompt": problem.question if len(problem.messages) == 1 else json.dumps(problem.messages),
        "reference": reference.text,
        "answer": answer,
        "rollouts": [rollout.text for rollout in group.rollouts],
        "majority": majority,
        "agrees": None if answer is None or majority is None else same(answer, majority),
    }


def _write_whole(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".parquet":
        write_table(rows, COLUMNS, temporary)
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
