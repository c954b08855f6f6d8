"""Records as rows of parquet tables, and back: one row per rollout, or one per reference."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cat_grpo.files import whole
from cat_grpo.records import (
    Completion,
    Group,
    Problem,
    Reference,
    RewardedGroup,
    RolloutReward,
    Rubric,
    Verdict,
)

Row = dict[str, Any]

ROW_GROUP = 512
"""A reader skips or takes this many rows as a whole, so that one group is read without its whole shard."""

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
        ("estimator", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("chosen", pa.int32()),
        ("written", pa.string()),
        ("refused", pa.string()),
        ("prompt", pa.string()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("majority", pa.string()),
        ("num_votes", pa.int32()),
    ]
)
REWARDS = pa.schema(
    [
        ("problem_id", pa.string()),
        ("rollout", pa.int32()),
        ("reward", pa.float64()),
        ("penalty", pa.float64()),
        ("parts", pa.map_(pa.string(), pa.float64())),
        ("agrees", pa.bool_()),
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
    return [Reference(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows]


def reward_rows(rewarded: Iterable[RewardedGroup]) -> Iterator[Row]:
    """One row per rollout, a group's rows together. `criteria` is null without a rubric."""
    for group in rewarded:
        for i, reward in enumerate(group.rewards):
            yield {
                "problem_id": group.group.problem.id,
                "rollout": i,
                "reward": reward.reward,
                "penalty": reward.penalty,
                "parts": list(reward.parts.items()),
                "agrees": reward.agrees,
                "answer": reward.answer,
                "criteria": group.rubric.criteria if group.rubric else None,
                "satisfied": [verdict.satisfied for verdict in reward.verdicts],
                "probabilities": [verdict.probability for verdict in reward.verdicts],
            }


def rewarded_from(
    rows: Iterable[Row], groups: Sequence[Group], references: Sequence[Reference]
) -> list[RewardedGroup]:
    """The inverse of `reward_rows`, joined in order to the groups and references that were judged."""
    return [
        RewardedGroup(
            group,
            reference,
            Rubric(tuple(members[0]["criteria"])) if members[0]["criteria"] is not None else None,
            tuple(_reward(row) for row in members),
        )
        for group, reference, members in zip(groups, references, _by_group(rows), strict=True)
    ]


def write_table(rows: Iterable[Row], schema: pa.Schema, path: Path) -> Path:
    """Writes the rows as one parquet file, whole. Returns its path."""
    with whole(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary, row_group_size=ROW_GROUP)
    return path


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


def _reward(row: Row) -> RolloutReward:
    verdicts = (Verdict(*verdict) for verdict in zip(row["satisfied"], row["probabilities"], strict=True))
    return RolloutReward(
        row["reward"], row["penalty"], dict(row["parts"]), row["agrees"], row["answer"], tuple(verdicts)
    )
