"""Records as rows of parquet tables, and back: one row a rollout, or one a reference."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cat_grpo.records import (
    Completion,
    Group,
    Problem,
    Reference,
    RolloutScore,
    Rubric,
    ScoredGroup,
    Verdict,
)

Row = dict[str, Any]

ROW_GROUP = 512
"""Rows that a file's reader can skip or take as a whole: who wants one group need not read a whole shard."""

ROLLOUTS = pa.schema(
    [
        ("problem_id", pa.string()),
        ("kind", pa.string()),
        ("messages", pa.string()),  # JSON: chats have any number of turns
        ("rollout", pa.int32()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
    ]
)
REFERENCES = pa.schema(
    [
        ("problem_id", pa.string()),
        ("text", pa.string()),
        ("aggregator", pa.string()),
        ("prompt", pa.string()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("majority", pa.string()),
        ("num_votes", pa.int32()),
    ]
)
SCORES = pa.schema(
    [
        ("problem_id", pa.string()),
        ("rollout", pa.int32()),
        ("reward", pa.float64()),
        ("penalty", pa.float64()),
        ("answer", pa.string()),
        ("criteria", pa.list_(pa.string())),
        ("satisfied", pa.list_(pa.bool_())),
        ("probabilities", pa.list_(pa.float64())),
    ]
)


def group_rows(groups: Iterable[Group]) -> Iterator[Row]:
    """One row per rollout, a group's rows together."""
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            yield {
                "problem_id": group.problem.id,
                "kind": group.problem.kind,
                "messages": json.dumps(group.problem.messages),
                "rollout": i,
                "text": rollout.text,
                "finish_reason": rollout.finish_reason,
                "prompt_token_ids": group.prompt_token_ids,
                "token_ids": rollout.token_ids,
                "logprobs": rollout.logprobs,
            }


def groups_from(rows: Iterable[Row]) -> list[Group]:
    """The inverse of `group_rows`."""
    groups = []
    for members in _by_group(rows):
        first = members[0]
        problem = Problem(first["problem_id"], tuple(json.loads(first["messages"])), first["kind"])
        rollouts = tuple(
            Completion(row["text"], tuple(row["token_ids"]), tuple(row["logprobs"]), row["finish_reason"])
            for row in members
        )
        groups.append(Group(problem, tuple(first["prompt_token_ids"]), rollouts))
    return groups


def reference_rows(references: Iterable[Reference]) -> Iterator[Row]:
    """One row per reference."""
    for reference in references:
        yield {name: getattr(reference, name) for name in REFERENCES.names}


def references_from(rows: Iterable[Row]) -> list[Reference]:
    """The inverse of `reference_rows`."""
    return [Reference(**row) for row in rows]


def score_rows(scored: Iterable[ScoredGroup]) -> Iterator[Row]:
    """One row per rollout, a group's rows together. `criteria` is null without a rubric."""
    for group in scored:
        for i, score in enumerate(group.scores):
            yield {
                "problem_id": group.group.problem.id,
                "rollout": i,
                "reward": score.reward,
                "penalty": score.penalty,
                "answer": score.answer,
                "criteria": group.rubric.criteria if group.rubric else None,
                "satisfied": [verdict.satisfied for verdict in score.verdicts],
                "probabilities": [verdict.probability for verdict in score.verdicts],
            }


def scored_from(
    rows: Iterable[Row], groups: Sequence[Group], references: Sequence[Reference]
) -> list[ScoredGroup]:
    """The inverse of `score_rows`, joined in order to the groups and references that were scored."""
    return [
        ScoredGroup(
            group,
            reference,
            Rubric(tuple(members[0]["criteria"])) if members[0]["criteria"] is not None else None,
            tuple(_score(row) for row in members),
        )
        for group, reference, members in zip(groups, references, _by_group(rows), strict=True)
    ]


def write_table(rows: Iterable[Row], schema: pa.Schema, path: Path) -> None:
    """The rows as one parquet file at `path`, which must not be read before this returns."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP)


def read_table(path: Path) -> list[Row]:
    return pq.read_table(path).to_pylist()


def _by_group(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Each group's rows. A problem may come twice in a row, so its id alone does not tell them apart."""
    members: list[Row] = []
    for row in rows:
        if members and row["rollout"] == 0:
            yield members
            members = []
        members.append(row)
    if members:
        yield members


def _score(row: Row) -> RolloutScore:
    verdicts = (Verdict(*verdict) for verdict in zip(row["satisfied"], row["probabilities"], strict=True))
    return RolloutScore(row["reward"], row["penalty"], row["answer"], tuple(verdicts))
