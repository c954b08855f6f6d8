"""Reads from a run directory only what a page shows: columns by name, and the rows on the page.

A run may be written while it is read. Its files appear whole, so a missing file has not been written yet.
Steps and groups count from 0, as folders do.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas  # noqa: F401 - pyarrow imports it at its first array, which would slow down the first page
import pyarrow as pa
import pyarrow.parquet as pq

from cat_grpo.config import Config
from cat_grpo.metrics import SCORE, Metrics
from cat_grpo.records import RewardedGroup
from cat_grpo.report.reviews import REVIEWS, Accuracy, Review, accuracy, latest, read_reviews
from cat_grpo.report.summaries import SUMMARIES, summarise
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.tables import Row, groups_from, references_from, rewarded_from

DEEPEST = 3
"""Runs are looked for in this many levels of folders below the given one."""
TAIL = 65_536
"""The list of runs reads only this many bytes from the end of a history: its last steps."""
STEPS_OF_A_PROBLEM = 200
"""One page looks for the same problem in this many steps."""
SHARED_PROBLEMS = 50


class NotThere(Exception):
    """The page asks for something that does not exist, or does not exist yet."""


@dataclass(frozen=True, slots=True)
class Card:
    """One run in the list."""

    name: str
    changed: float
    """Seconds since 1970."""
    num_steps: int
    planned: int | None
    data: str
    reward: float | None
    score: float | None
    reviews: Accuracy


def run_names(root: Path) -> list[str]:
    """The paths of the runs below `root`, relative to it. Does not look inside a run."""
    return sorted(_runs_below(root.resolve(), "", DEEPEST))


def _runs_below(root: Path, name: str, depth: int) -> Iterator[str]:
    for entry in os.scandir(root / name):
        below = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith(".") or not entry.is_dir() or not _is_inside(root, root / below):
            continue
        if (root / below / "config.json").is_file():
            yield below
        elif depth > 1:
            yield from _runs_below(root, below, depth - 1)


def _is_inside(root: Path, path: Path) -> bool:
    """Whether the path, with its links resolved, is below `root`. Links that lead out are not followed."""
    return path.resolve().is_relative_to(root)


def find_run(root: Path, name: str) -> RunDir:
    """The run of this name. NotThere when it is no run below `root`, whatever the name contains."""
    root, parts = root.resolve(), name.split("/")
    if "\0" in name or len(parts) > DEEPEST or any(not part or part.startswith(".") for part in parts):
        raise NotThere(f"there is no run {name!r}")
    path = root.joinpath(*parts)
    if not _is_inside(root, path) or not (path / "config.json").is_file():
        raise NotThere(f"there is no run {name!r}")
    return RunDir(path)


def cards(root: Path) -> list[Card]:
    """One card per run, newest first."""
    return sorted(
        (_card(root, name) for name in run_names(root)), key=lambda card: card.changed, reverse=True
    )


def _card(root: Path, name: str) -> Card:
    folder = root / name
    config = json.loads((folder / "config.json").read_text())
    data, train = config.get("data", {}), config.get("train", {})
    history, changed = folder / "metrics.jsonl", (folder / "config.json").stat().st_mtime
    end: list[Metrics] = []
    if history.is_file():
        end, changed = _last_lines(history), history.stat().st_mtime
    scores = [metrics[SCORE] for metrics in end if SCORE in metrics]
    return Card(
        name,
        changed,
        int(end[-1]["step"]) + 1 if end else 0,
        train.get("steps"),
        data.get("kind") or data.get("path") or "",
        end[-1].get("reward/mean") if end else None,
        scores[-1] if scores else None,
        accuracy(reviews_of(folder)),
    )


def _last_lines(path: Path) -> list[Metrics]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().splitlines()
    return [json.loads(line) for line in (lines[1:] if size > TAIL else lines)]


def reviews_of(folder: Path) -> list[Review]:
    """All reviews of the run, in the order in which they were written."""
    path = folder / REVIEWS
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return _read_reviews(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=512)
def _read_reviews(path: Path, changed: int, size: int) -> list[Review]:
    return read_reviews(path)


def reviews_of_step(run: RunDir, step: int) -> dict[int, Review]:
    """The last review of each group that has one."""
    return {group: review for (at, group), review in latest(reviews_of(run.path)).items() if at == step}


def steps_of(run: RunDir) -> list[int]:
    """The steps that have started, in order."""
    folder = run.path / "steps"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def summaries(run: RunDir, step: int, columns: Sequence[str]) -> pa.Table:
    """These columns of all groups of the step. NotThere when none has rewards yet."""
    try:
        return _columns(run.summaries_file(step), columns)
    except FileNotFoundError:
        return _from_shards(run, step).select(list(columns))


def summary_rows_at(run: RunDir, step: int, places: Sequence[int]) -> list[Row]:
    """All columns of the groups in these places of the step's table, in this order."""
    try:
        return _rows_at(run.summaries_file(step), places)
    except FileNotFoundError:
        return _from_shards(run, step).take(pa.array(places, pa.int64())).to_pylist()


def groups_of(run: RunDir, step: int) -> list[int]:
    """The positions of the groups that have rewards: all groups, unless the step is still running."""
    return summaries(run, step, ["group"])["group"].to_pylist()


def place_of(run: RunDir, step: int, group: int) -> int:
    """The group's row in the step's table. NotThere when it has none."""
    groups = groups_of(run, step)
    if group not in groups:
        raise NotThere(f"step {step} has no group {group}")
    return groups.index(group)


def read_group(run: RunDir, step: int, group: int) -> RewardedGroup:
    """One group in full, from its shard's files."""
    shard, place = divmod(group, run.config.shard_size)
    rollouts, rewards = (
        _rows_at(path, _rollouts_at(path, place))
        for path in (run.stage_file(step, "rollouts", shard), run.stage_file(step, "rewards", shard))
    )
    references = _rows_at(run.stage_file(step, "references", shard), [place])
    return rewarded_from(rewards, groups_from(rollouts), references_from(references))[0]


def problem_rows(
    run: RunDir, problem_id: str, before: int | None
) -> tuple[list[tuple[int, Row]], int | None]:
    """The problem's (step, row) pairs, newest first, and the next value of `before`; None on the last one."""
    steps = [step for step in reversed(steps_of(run)) if before is None or step < before]
    found = []
    for step in steps[:STEPS_OF_A_PROBLEM]:
        path = run.summaries_file(step)
        if path.is_file():
            rows = pq.read_table(path, filters=[("problem_id", "=", problem_id)]).to_pylist()
            found += [(step, row) for row in rows]
    more = len(steps) > STEPS_OF_A_PROBLEM
    return found, steps[STEPS_OF_A_PROBLEM - 1] if more else None


def shared_steps(ours: RunDir, theirs: RunDir) -> list[int]:
    """The finished steps that both have."""
    return [
        step
        for step in sorted({*steps_of(ours)} & {*steps_of(theirs)})
        if ours.summaries_file(step).is_file() and theirs.summaries_file(step).is_file()
    ]


def shared_problems(ours: RunDir, theirs: RunDir, step: int) -> list[tuple[Row, Row]]:
    """The first problems of the step that both have."""
    ids = [summaries(run, step, ["problem_id"])["problem_id"].to_pylist() for run in (ours, theirs)]
    theirs_at = {problem_id: place for place, problem_id in enumerate(ids[1])}
    places = [place for place, problem_id in enumerate(ids[0]) if problem_id in theirs_at][:SHARED_PROBLEMS]
    others = [theirs_at[ids[0][place]] for place in places]
    rows = summary_rows_at(ours, step, places), summary_rows_at(theirs, step, others)
    return list(zip(*rows, strict=True))


def settings(run: RunDir) -> dict[str, Any]:
    return run.config.model_dump(mode="json")


def default_settings() -> dict[str, Any]:
    return Config().model_dump(mode="json")


def figures_at(history: Sequence[Metrics], step: int) -> Metrics:
    """The figures of a step, without those that are not finite; empty while the step has none."""
    now = history[step] if 0 <= step < len(history) else {}
    return {name: value for name, value in now.items() if math.isfinite(value)}


def _from_shards(run: RunDir, step: int) -> pa.Table:
    """The summaries of the shards so far. KL, total rewards and advantages come with the update."""
    files = run.step_folder(step).glob("rewards-*.parquet")
    shards = sorted((int(path.stem.removeprefix("rewards-")), path.stat().st_mtime_ns) for path in files)
    if not shards:
        raise NotThere(f"step {step} has no group yet")
    return _read_shards(run.path, step, tuple(shards))


@lru_cache(maxsize=2)
def _read_shards(folder: Path, step: int, shards: tuple[tuple[int, int], ...]) -> pa.Table:
    run = RunDir(folder)
    tables = []
    for shard, _ in shards:
        rows = summarise(run.read_rewarded(step, shard), shard * run.config.shard_size)
        tables.append(pa.Table.from_pylist([asdict(row) for row in rows], schema=SUMMARIES))
    return pa.concat_tables(tables)


def _rollouts_at(path: Path, place: int) -> range:
    """The rows of the group in this place. A file has one row per rollout, and a group starts at number 0."""
    numbers = _columns(path, ["rollout"])["rollout"].to_pylist()
    starts = [row for row, number in enumerate(numbers) if number == 0]
    if place >= len(starts):
        raise NotThere(f"{path.name} has no group {place}")
    return range(starts[place], [*starts, len(numbers)][place + 1])


def _columns(path: Path, names: Sequence[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(columns=list(names))


def _rows_at(path: Path, places: Iterable[int]) -> list[Row]:
    """These rows in this order. Reads only the row groups of the file that contain them."""
    places = list(places)
    with pq.ParquetFile(path) as file:
        start, wanted, offsets = 0, [], {}
        for i in range(file.num_row_groups):
            size = file.metadata.row_group(i).num_rows
            here = [place for place in places if start <= place < start + size]
            if here:
                read = sum(file.metadata.row_group(k).num_rows for k in wanted)
                offsets |= {place: read + place - start for place in here}
                wanted.append(i)
            start += size
        if len(offsets) < len(set(places)):
            raise NotThere(f"{path.name} has no row {max(places)}")
        order = pa.array([offsets[place] for place in places], pa.int64())
        return file.read_row_groups(wanted).take(order).to_pylist()
