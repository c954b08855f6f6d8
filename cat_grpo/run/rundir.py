"""The run directory is the truth: what it holds was done, and what it lacks is still to do.

    config.json  manifest.json  metrics.jsonl (a line per finished step)  changes.jsonl (in the data)
    steps/000012/rollouts-00.parquet  references-00.parquet  rewards-00.parquet  groups.parquet
    steps/000012/gate.json (what a person decided)
    reviews.jsonl  checkpoints/000020/  latest -> 000020  best -> 000010

Files appear whole, by rename, or not at all; metrics.jsonl and reviews.jsonl only grow.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cat_grpo.config import Config
from cat_grpo.errors import BadInput
from cat_grpo.files import append_line, seed_of, write_whole
from cat_grpo.method.cat import templates
from cat_grpo.method.prompts import template_hashes
from cat_grpo.metrics import Metrics
from cat_grpo.records import Group, Problem, Reference, RewardedGroup, kinds_of
from cat_grpo.report.summaries import SUMMARIES, Summary
from cat_grpo.run.order import Change, change_lines, changes_with, read_changes
from cat_grpo.run.tables import (
    REFERENCES,
    REWARDS,
    ROLLOUTS,
    group_rows,
    groups_from,
    read_table,
    reference_rows,
    references_from,
    reward_rows,
    rewarded_from,
    write_table,
)
from cat_grpo.settings import differences, may_change, read_config

VERSIONS_OF = ("cat-grpo", "torch", "transformers", "datasets", "prefect")


class RunDir:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = read_config(path / "config.json")

    @classmethod
    def open(cls, path: Path, config: Config, problems: Sequence[Problem]) -> "RunDir":
        """Opens a new run, or resumes the existing one.

        BadInput when the run there was started with settings that would make its steps mean another thing.
        """
        refuse_other_settings(path, config, problems)
        manifest = _manifest(config, problems, _saved_hashes(path))
        write_whole(path / "manifest.json", json.dumps(manifest, indent=2))
        write_whole(path / "config.json", config.model_dump_json(indent=2))
        return cls(path)

    @property
    def best_checkpoint(self) -> Path:
        """The folder of the best checkpoint, or of the latest where none is marked as the best."""
        best = self.checkpoints / "best"
        return best if best.exists() else self.checkpoints / "latest"

    def seed(self, step: int, stage: str, problem_id: str) -> int:
        """Returns a seed that depends on (run seed, step, stage, problem) and on nothing else."""
        return seed_of(self.config.train.seed, step, stage, problem_id)

    def step_folder(self, step: int) -> Path:
        return self.path / "steps" / f"{step:06d}"

    def stage_file(self, step: int, stage: str, shard: int) -> Path:
        return self.step_folder(step) / f"{stage}-{shard:02d}.parquet"

    def write_groups(self, step: int, shard: int, groups: Sequence[Group]) -> Path:
        return write_table(group_rows(groups), ROLLOUTS, self.stage_file(step, "rollouts", shard))

    def read_groups(self, step: int, shard: int) -> list[Group]:
        return groups_from(read_table(self.stage_file(step, "rollouts", shard)))

    def write_references(self, step: int, shard: int, references: Sequence[Reference]) -> Path:
        return write_table(reference_rows(references), REFERENCES, self.stage_file(step, "references", shard))

    def read_references(self, step: int, shard: int) -> list[Reference]:
        return references_from(read_table(self.stage_file(step, "references", shard)))

    def write_rewards(self, step: int, shard: int, rewarded: Sequence[RewardedGroup]) -> Path:
        return write_table(reward_rows(rewarded), REWARDS, self.stage_file(step, "rewards", shard))

    def read_rewarded(self, step: int, shard: int) -> list[RewardedGroup]:
        rows = read_table(self.stage_file(step, "rewards", shard))
        return rewarded_from(rows, self.read_groups(step, shard), self.read_references(step, shard))

    def read_step(self, step: int, first: int | None = None) -> list[RewardedGroup]:
        """Returns the groups of the step's finished shards, in order, or only the `first` ones."""
        num_shards = len(list(self.step_folder(step).glob("rewards-*.parquet")))
        if first is not None:
            num_shards = min(num_shards, -(-first // self.config.shard_size))
        return [group for shard in range(num_shards) for group in self.read_rewarded(step, shard)][:first]

    def summaries_file(self, step: int) -> Path:
        return self.step_folder(step) / "groups.parquet"

    def write_summaries(self, step: int, summaries: Sequence[Summary]) -> Path:
        return write_table(map(asdict, summaries), SUMMARIES, self.summaries_file(step))

    def first_free_step(self) -> int:
        """Returns the step after the last one that has any file."""
        begun = [int(folder.name) for folder in self.path.glob("steps/*")]
        return max(begun, default=-1) + 1

    def take_in(self, ids: Sequence[str]) -> tuple[Change, ...]:
        """Records that the data now has these problems, from the first free step on. Returns all changes."""
        path = self.path / "changes.jsonl"
        before = read_changes(path)
        changes = changes_with(before, ids, self.first_free_step() if before else 0)
        if changes != before:
            write_whole(path, change_lines(changes))
        return changes

    def write_decision(self, step: int, accepted: bool, note: str) -> None:
        """Keeps a person's decision on the step's references: a step done again does not ask again."""
        text = json.dumps({"accepted": accepted, "note": note}, ensure_ascii=False)
        write_whole(self.step_folder(step) / "gate.json", text)

    def read_decision(self, step: int) -> bool | None:
        """Whether the step's references were accepted; None where nobody has decided."""
        path = self.step_folder(step) / "gate.json"
        return json.loads(path.read_text(encoding="utf-8"))["accepted"] if path.exists() else None

    def metrics(self) -> list[Metrics]:
        """Reads one dict per finished step, in order."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add_metrics(self, metrics: Metrics) -> None:
        """Appends the line of one step, in a time that does not grow with the history."""
        append_line(self.path / "metrics.jsonl", json.dumps(metrics))

    def cut_metrics(self, num_steps: int) -> list[Metrics]:
        """Returns the lines of the first `num_steps` steps and drops all others, even a broken one."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if len(lines) > num_steps:
            write_whole(path, "".join(f"{line}\n" for line in lines[:num_steps]))
        return [json.loads(line) for line in lines[:num_steps]]


def refuse_other_settings(path: Path, config: Config, problems: Sequence[Problem]) -> None:
    """BadInput when `path` cannot be the directory of a run with these settings and templates.

    A setting that the saved run lacks had its default. A template that it has not used yet does not count.
    """
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is not a directory")
    saved = path / "config.json"
    if not saved.exists():
        return
    there, asked = (each.model_dump(mode="json") for each in (read_config(saved), config))
    for key, before, _ in differences(there, asked):
        if not may_change(key):
            raise BadInput(
                f"{saved}: {key}: the run was started with {json.dumps(before)};"
                " take another directory or the same settings"
            )
    before, now = _saved_hashes(path), _hashes(config, problems)
    if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
        raise BadInput(f"{path / 'manifest.json'}: {changed[0]}.txt has changed since the run was started")


def _hashes(config: Config, problems: Sequence[Problem]) -> dict[str, str]:
    return template_hashes(config.prompts, templates(config, kinds_of(problems)))


def _saved_hashes(path: Path) -> dict[str, str]:
    """Returns the hashes of the templates that the saved run has used; {} for a new run."""
    manifest = path / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["prompt_hashes"] if manifest.exists() else {}


def _manifest(
    config: Config, problems: Sequence[Problem], hashes_before: Mapping[str, str]
) -> dict[str, Any]:
    content = json.dumps([(problem.id, problem.kind, problem.messages) for problem in problems])
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS_OF}},
        "git": _git_commit(),
        "prompt_set": config.prompts,
        "prompt_hashes": {**hashes_before, **_hashes(config, problems)},
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
