"""The run directory is the truth: what it holds was done, and what it lacks is still to do.

    config.json  manifest.json  metrics.jsonl  changes.jsonl (of the data)
    steps/000012/rollouts-00.parquet  references-00.parquet  scores-00.parquet  groups.parquet
    steps/000012/gate.json (what a person decided)
    reviews.jsonl  checkpoints/000020/  latest -> 000020  best -> 000010

Files appear whole, by rename, or not at all.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from cat_grpo.config import Config
from cat_grpo.order import Change, change_lines, changes_with, read_changes
from cat_grpo.prompts import prompt_hashes
from cat_grpo.records import Group, Problem, Reference, ScoredGroup
from cat_grpo.summaries import SUMMARIES, Summary
from cat_grpo.tables import (
    REFERENCES,
    ROLLOUTS,
    SCORES,
    group_rows,
    groups_from,
    read_table,
    reference_rows,
    references_from,
    score_rows,
    scored_from,
    write_table,
)

Metrics = dict[str, float]

VERSIONS_OF = ("cat-grpo", "torch", "transformers", "datasets", "prefect")
MAY_CHANGE = {
    "train": {
        "steps",
        "checkpoint_every",
        "validation",
        "validation_limit",
        "patience",
        "max_consensus",
        "tracker",
        "review_gate",
    },
    "learner": {"micro_batch_tokens", "gradient_checkpointing"},
    "model": {"max_batch_tokens", "vllm", "server"},
    "data": {"reviews"},
    "budget": {"steps", "minutes", "problems"},
}
"""What a resumed run may set anew, for more steps, less memory or other servers; the rest decides what its
steps mean."""


class RunDir:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = Config.model_validate_json((path / "config.json").read_text())

    @classmethod
    def open(cls, path: Path, config: Config, problems: Sequence[Problem]) -> "RunDir":
        """A new run, or the one that is there, to go on with.

        ValueError when the run there was started with settings that would make its steps mean another thing.
        """
        refuse_other_settings(path, config)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "manifest.json", json.dumps(_manifest(config, problems), indent=2))
        write_whole(path / "config.json", config.model_dump_json(indent=2))
        return cls(path)

    def seed(self, step: int, stage: str, problem_id: str) -> int:
        """A function of (run seed, step, stage, problem) and of nothing else."""
        return seed_of(self.config.train.seed, step, stage, problem_id)

    def step_folder(self, step: int) -> Path:
        return self.path / "steps" / f"{step:06d}"

    def stage_file(self, step: int, stage: str, shard: int) -> Path:
        return self.step_folder(step) / f"{stage}-{shard:02d}.parquet"

    def write_groups(self, step: int, shard: int, groups: Sequence[Group]) -> Path:
        return _write_rows(self.stage_file(step, "rollouts", shard), group_rows(groups), ROLLOUTS)

    def read_groups(self, step: int, shard: int) -> list[Group]:
        return groups_from(read_table(self.stage_file(step, "rollouts", shard)))

    def write_references(self, step: int, shard: int, references: Sequence[Reference]) -> Path:
        return _write_rows(self.stage_file(step, "references", shard), reference_rows(references), REFERENCES)

    def read_references(self, step: int, shard: int) -> list[Reference]:
        return references_from(read_table(self.stage_file(step, "references", shard)))

    def write_scores(self, step: int, shard: int, scored: Sequence[ScoredGroup]) -> Path:
        return _write_rows(self.stage_file(step, "scores", shard), score_rows(scored), SCORES)

    def read_scored(self, step: int, shard: int) -> list[ScoredGroup]:
        rows = read_table(self.stage_file(step, "scores", shard))
        return scored_from(rows, self.read_groups(step, shard), self.read_references(step, shard))

    def read_step(self, step: int, first: int | None = None) -> list[ScoredGroup]:
        """The groups of all shards of a step that are done, in order; or only the `first` so many."""
        num_shards = len(list(self.step_folder(step).glob("scores-*.parquet")))
        if first is not None:
            num_shards = min(num_shards, -(-first // self.config.shard_size))
        return [scored for shard in range(num_shards) for scored in self.read_scored(step, shard)][:first]

    def summaries_file(self, step: int) -> Path:
        return self.step_folder(step) / "groups.parquet"

    def write_summaries(self, step: int, summaries: Sequence[Summary]) -> Path:
        return _write_rows(self.summaries_file(step), map(asdict, summaries), SUMMARIES)

    def first_free_step(self) -> int:
        """The first step that nothing was made for, nor for any after it."""
        begun = [int(folder.name) for folder in self.path.glob("steps/*")]
        return max(begun, default=-1) + 1

    def take_in(self, ids: Sequence[str]) -> tuple[Change, ...]:
        """The data has these problems now: from the first free step on. Returns all changes so far."""
        path = self.path / "changes.jsonl"
        before = read_changes(path)
        changes = changes_with(before, ids, self.first_free_step() if before else 0)
        if changes != before:
            write_whole(path, change_lines(changes))
        return changes

    def write_decision(self, step: int, accepted: bool, note: str) -> None:
        """What a person said to the step's references: a step that is done again does not ask again."""
        text = json.dumps({"accepted": accepted, "note": note}, ensure_ascii=False)
        write_whole(self.step_folder(step) / "gate.json", text)

    def read_decision(self, step: int) -> bool | None:
        """Whether the step's references were accepted; None where nobody has said."""
        path = self.step_folder(step) / "gate.json"
        return json.loads(path.read_text(encoding="utf-8"))["accepted"] if path.exists() else None

    def metrics(self) -> list[Metrics]:
        """One dict per finished step, in order."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_metrics(self, history: Sequence[Metrics]) -> None:
        """The whole history anew: a step that is done again replaces its line."""
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in history))


def seed_of(run_seed: int, step: int, stage: str, problem_id: str) -> int:
    """63 bits that depend on all four and on nothing else."""
    digest = hashlib.sha256(f"{run_seed} {step} {stage} {problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def write_whole(path: Path, text: str) -> None:
    """The file has the old content or the new one, never a part."""
    _appear(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_rows(path: Path, rows: Any, schema: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _appear(path, lambda temporary: write_table(rows, schema, temporary))
    return path


def _appear(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _manifest(config: Config, problems: Sequence[Problem]) -> dict[str, Any]:
    content = json.dumps([(problem.id, problem.kind, problem.messages) for problem in problems])
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
        "git": _git_commit(),
        "prompt_set": config.prompts,
        "prompt_hashes": prompt_hashes(config.prompts),
        "data_fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "num_problems": len(problems),
        "seed": config.train.seed,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def refuse_other_settings(path: Path, config: Config) -> None:
    """ValueError when `path` cannot be the directory of a run with these settings."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is not a directory")
    if not (path / "config.json").exists():
        return
    there = json.loads((path / "config.json").read_text())
    asked = json.loads(config.model_dump_json())
    for tree, (section, keys) in product((there, asked), MAY_CHANGE.items()):
        tree[section] = {key: value for key, value in tree.get(section, {}).items() if key not in keys}
    for section in asked:
        if asked[section] != there.get(section):
            whole = (section, there.get(section), asked[section])
            # To `differences` what is missing is None; here it is something else.
            key, before, _ = [*differences({section: whole[1]}, {section: whole[2]}), whole][0]
            raise ValueError(
                f"{path / 'config.json'}: {key}: the run was started with {json.dumps(before)};"
                f" take another directory or the same settings"
            )
    manifest = path / "manifest.json"
    if json.loads(manifest.read_text())["prompt_hashes"] != prompt_hashes(config.prompts):
        raise ValueError(f"{manifest}: prompt_hashes: the prompts have changed since the run was started")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of each setting that is not the same in both trees."""
    flat = [dict(_flat(tree)) for tree in (ours, theirs)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = [(key, flat[0].get(key), flat[1].get(key)) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
