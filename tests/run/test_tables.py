"""Records become rows of parquet files and come back as they were: a resumed run reads what it wrote."""

import math
from pathlib import Path

import pytest

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

TEXTS = ("plain", "", "Ä 漢 🙂 \u2028 \u202e", 'a "quoted", {{ 7*7 }}\n\t\\boxed{1}', "\x00 \x1b")
CHAT = (
    {"role": "system", "content": "Be brief: ü."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": 'And "then"?\n'},
)


def completion(text: str, finish_reason: str = "stop") -> Completion:
    # 0.1 + 0.2 and the smallest float are not short decimals: logprobs come back to the last bit
    return Completion(text, (3, 151_935, 0), (-0.1 - 0.2, -5e-324, 0.0), finish_reason)


def group(name: str, *texts: str, messages=({"role": "user", "content": "Q?"},), kind="verifiable") -> Group:
    return Group(Problem(name, messages, kind), (5, 6), tuple(map(completion, texts)))


GROUPS = [
    group("a", *TEXTS),
    group("Ä/1 \n", "x", "y", messages=CHAT, kind="open"),
    Group(
        Problem("1", CHAT[-1:], "open"),
        (),
        (Completion("", (), (), "length"), completion("cut", "length")),
    ),
]
REFERENCE_LIST = [
    Reference(
        text=r"So \boxed{½}",
        answer="½",
        token_ids=(3, 151_935),
        written=r"So \boxed{½}",
        prompt="prompt 漢",
        num_tokens=7,
        finish_reason="stop",
        problem_id="a",
        estimator="synthesis",
        majority="½",
        num_votes=3,
    ),
    Reference(
        None, refused="cut off", written="And", num_tokens=64, finish_reason="length", problem_id="Ä/1 \n"
    ),
    Reference("", chosen=1, problem_id="1", estimator="majority"),
]
REWARDED = [
    RewardedGroup(
        GROUPS[0],
        REFERENCE_LIST[0],
        None,
        (
            RolloutReward(1.0, parts={"agreement": 1.0, "own:é": 0.1}, agrees=True, answer="½"),
            RolloutReward(0.0, 1.0, {"agreement": 0.0, "own:é": None}, agrees=False),
            *[RolloutReward(None, 0.5, answer="")] * 3,
        ),
    ),
    RewardedGroup(
        GROUPS[1],
        REFERENCE_LIST[1],
        Rubric(("Says é.", 'Says "b".')),
        (
            RolloutReward(1 / 3, verdicts=(Verdict(True, 1 / 3), Verdict(None, None))),
            RolloutReward(None, verdicts=(Verdict(None, 0.5), Verdict(False, None))),
        ),
    ),
    RewardedGroup(GROUPS[2], REFERENCE_LIST[2], Rubric(()), (RolloutReward(None),) * 2),
]


def through_a_file(rows, schema, folder: Path) -> list[dict]:
    write_table(rows, schema, folder / "table.parquet")
    return read_table(folder / "table.parquet")


def test_groups_come_back_as_they_were(tmp_path):
    assert groups_from(through_a_file(group_rows(GROUPS), ROLLOUTS, tmp_path)) == GROUPS


def test_references_come_back_as_they_were(tmp_path):
    rows = through_a_file(reference_rows(REFERENCE_LIST), REFERENCES, tmp_path)
    assert references_from(rows) == REFERENCE_LIST


def test_rewards_come_back_as_they_were(tmp_path):
    rows = through_a_file(reward_rows(REWARDED), REWARDS, tmp_path)
    assert rewarded_from(rows, GROUPS, REFERENCE_LIST) == REWARDED


def test_a_reward_of_nothing_stays_apart_from_zero(tmp_path):
    rows = through_a_file(reward_rows(REWARDED), REWARDS, tmp_path)
    assert [row["reward"] for row in rows[:3]] == [1.0, 0.0, None]
    assert rows[0]["criteria"] is None
    assert rows[-1]["criteria"] == []


def test_no_rows_are_a_table_too(tmp_path):
    assert groups_from(through_a_file([], ROLLOUTS, tmp_path)) == []
    assert references_from(through_a_file([], REFERENCES, tmp_path)) == []
    assert rewarded_from(through_a_file([], REWARDS, tmp_path), [], []) == []


def test_a_problem_that_comes_twice_in_a_row_stays_two_groups(tmp_path):
    # where one epoch ends and the next begins, or when the data are smaller than a step
    twice = [group("a", "one", "two"), group("a", "three", "four"), group("b", "five", "six")]
    assert groups_from(through_a_file(group_rows(twice), ROLLOUTS, tmp_path)) == twice
    references = [REFERENCE_LIST[0], REFERENCE_LIST[0], REFERENCE_LIST[2]]
    rewarded = [
        RewardedGroup(one, reference, None, tuple(RolloutReward(reward) for reward in rewards))
        for one, reference, rewards in zip(
            twice, references, [(0.0, 0.25), (0.5, 0.75), (1.0, None)], strict=True
        )
    ]
    assert (
        rewarded_from(through_a_file(reward_rows(rewarded), REWARDS, tmp_path), twice, references) == rewarded
    )


def test_one_row_a_rollout_in_order():
    rows = list(group_rows(GROUPS))
    assert [(row["problem_id"], row["rollout"], row["text"]) for row in rows[:6]] == [
        *(("a", i, text) for i, text in enumerate(TEXTS)),
        ("Ä/1 \n", 0, "x"),
    ]


def test_a_table_of_other_groups_is_refused(tmp_path):
    rows = through_a_file(reward_rows(REWARDED), REWARDS, tmp_path)
    with pytest.raises(ValueError, match="zip"):
        rewarded_from(rows, GROUPS[:2], REFERENCE_LIST[:2])


def test_no_float_is_rounded(tmp_path):
    third = RewardedGroup(GROUPS[0], REFERENCE_LIST[0], None, (RolloutReward(1 / 3, math.pi),) * 5)
    (row, *_) = through_a_file(reward_rows([third]), REWARDS, tmp_path)
    assert (row["reward"], row["penalty"]) == (1 / 3, math.pi)
