"""What a person reads of a run: whole, in bounds, and never rewritten by the texts that it shows."""

import json
from typing import Any

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
from cat_grpo.report.pages import (
    MAX_BYTES,
    MAX_ROLLOUTS,
    MAX_ROWS,
    figures_table,
    gate_markdown,
    group_markdown,
    reference_rows,
    run_markdown,
    step_markdown,
    summary_table,
    table_rows,
)
from cat_grpo.report.reviews import Accuracy
from cat_grpo.run.stopping import warnings

HISTORY = [
    {"step": 0.0, "reward/mean": 0.25, "consensus/majority_frac": 0.5, "policy/entropy": 2.0},
    {"step": 1.0, "reward/mean": 0.75, "consensus/majority_frac": 0.625, "policy/entropy": 1.5},
]


def rewarded_group(
    texts: tuple[str, ...] = (r"\boxed{4}", r"\boxed{5}"),
    values: tuple[float | None, ...] = (1.0, 0.0),
    answers: tuple[str | None, ...] = ("4", "5"),
    agrees: tuple[bool | None, ...] = (True, False),
    reference: str | None = r"\boxed{4}",
    majority: str | None = "4",
    question: str = "2 + 2",
    **others: Any,
) -> RewardedGroup:
    """A verifiable group: two rollouts, the first of them right."""
    problem = Problem("sums-1", ({"role": "user", "content": question},), "verifiable")
    rollouts = tuple(Completion(text, (1,), (-0.1,), "stop") for text in texts)
    rewards = tuple(
        RolloutReward(value, agrees=agree, answer=answer)
        for value, answer, agree in zip(values, answers, agrees, strict=True)
    )
    told = Reference(
        reference,
        answer=reference and "4",
        refused=None if reference else "it has no final answer",
        num_tokens=3,
        finish_reason="stop",
        problem_id=problem.id,
        estimator="synthesis",
        majority=majority,
        num_votes=1,
    )
    group = Group(problem, (1, 2), rollouts)
    return RewardedGroup(group, told, others.get("rubric"), others.get("rewards", rewards))


def endless_group(text: str) -> RewardedGroup:
    """Every text as long as one likes."""
    n = 4 * MAX_ROLLOUTS
    verdicts = (Verdict(True, None),) * (2 * MAX_ROWS)
    return rewarded_group(
        texts=(text,) * n,
        values=(1.0,) * n,
        answers=(text,) * n,
        agrees=(True,) * n,
        reference=text,
        majority=text,
        question=text,
        rubric=Rubric((text,) * len(verdicts)),
        rewards=(RolloutReward(1.0, agrees=True, answer=text, verdicts=verdicts),) * n,
    )


def test_a_page_has_every_figure_and_its_first_value():
    page = step_markdown(HISTORY, [rewarded_group()], num_steps=10)
    assert page.startswith("# Step 2 of 10\n")
    assert "| mean | 0.75 | 0.5 | 0.25 |" in page  # reward: now, the mean of both, step 1
    assert "| majority | 62.5% | 56.2% | 50.0% |" in page
    assert "Reward **0.75** (step 1: 0.25)" in page


def test_a_validation_has_its_standard_error():
    now = HISTORY[1] | {"validation/pass@1": 0.5, "validation/pass@1_se": 0.125}
    page = step_markdown([HISTORY[0], now], [rewarded_group()], num_steps=10)
    assert "| pass@1 | 0.500 ± 0.125 | 0.5 |  |" in page


def test_alarms_come_first():
    stopped, look = "nothing is left to reconcile", "6.0% of the rollouts have no reward"
    page = step_markdown(HISTORY, [rewarded_group()], num_steps=10, alarm=stopped, warnings=[look])
    assert page.index(stopped) < page.index(look) < page.index("Reward **0.75**")
    calm = step_markdown(HISTORY, [rewarded_group()], num_steps=10)
    assert "Stopped here" not in calm and "Warning:" not in calm


@pytest.mark.parametrize(
    ("late", "words"),
    [
        ({"reward/dropped_frac": 0.06}, "6.0% of the rollouts have no reward"),
        ({"rubric/abstained_frac": 0.2}, "20.0% of the verdicts are missing"),
        ({"consensus/majority_frac": 0.96, "policy/entropy": 1.9}, "nearly all agree"),
    ],
)
def test_warnings_by_hand(late: dict[str, float], words: str):
    [told] = warnings([HISTORY[0], late]).values()
    assert words in told
    assert warnings(HISTORY) == {}


def test_a_checkpoint_below_the_best_is_a_warning_and_an_equal_one_is_not():
    best, equal, worse = ({"selection/score": score} for score in (0.7, 0.7, 0.6))
    assert warnings([best, equal]) == {}
    assert [*warnings([best, equal, worse]).values()] == [
        "the last checkpoint scores 0.600, that of step 1 0.700"
    ]


def test_a_reference_stands_beside_its_rollouts():
    page = group_markdown(rewarded_group())
    assert r"| **reference** | \\boxed\{4\} |" in page
    assert "| **majority** | 4 (1 of 2); the reference agrees |" in page
    assert r"| 2 | \\boxed\{5\} | 0.00 |" in page


@pytest.mark.parametrize(
    ("agrees", "words"),
    [((False, True), "the reference **differs**"), ((False, False), "the reference is in **no rollout**")],
)
def test_a_page_says_when_the_reference_is_not_the_majority(agrees: tuple[bool, bool], words: str):
    assert words in group_markdown(rewarded_group(agrees=agrees))


def test_who_agrees_is_not_read_off_the_reward():
    """A reward may have other parts than the answer."""
    page = group_markdown(rewarded_group(values=(0.9, 0.1)))
    assert "| **majority** | 4 (1 of 2); the reference agrees |" in page


def test_a_rubric_is_counted_over_the_verdicts_that_were_read():
    yes, no, lost = (Verdict(satisfied, None) for satisfied in (True, False, None))
    rewards = tuple(RolloutReward(1.0, verdicts=verdicts) for verdicts in ((yes, no), (lost, no)))
    page = group_markdown(rewarded_group(rubric=Rubric(("is short", "is kind")), rewards=rewards))
    assert "| is short | 1 of 1 |" in page
    assert "| is kind | 0 of 2 |" in page


def test_what_was_not_judged_is_not_a_zero():
    group = rewarded_group(values=(None, None), agrees=(None, None), reference=None)
    page = group_markdown(group)
    assert page.count("not judged") == 2
    assert "| **reference** | none: it has no final answer |" in page
    assert reference_rows([group])[0]["mean reward"] == ""


def test_rows_of_references():
    assert reference_rows([rewarded_group()]) == [
        {
            "prompt": "2 + 2",
            "reference": r"\boxed{4}",
            "majority": "4",
            "agrees": "yes",
            "mean reward": 0.5,
            "rewarded": "2 of 2",
        }
    ]


@pytest.mark.parametrize("text", ["word " * 9_000, "\N{GRINNING FACE}" * 9_000, "\\|`" * 9_000, "\n" * 99])
def test_no_text_is_too_long_for_a_page(text: str):
    group = endless_group(text)
    assert len(json.dumps(group_markdown(group))) <= MAX_BYTES
    rows = reference_rows([group] * (3 * MAX_ROWS))
    assert len(rows) == MAX_ROWS
    assert len(json.dumps(rows)) <= MAX_BYTES


def test_a_cut_cell_says_how_much_there_is():
    row = table_rows([{"text": "x" * 2000}])[0]
    assert row["text"].endswith("x … (2000 characters)")
    assert table_rows([{"text": "x" * 1000}])[0]["text"] == "x" * 1000


def test_a_text_cannot_end_its_cell():
    hostile = "1 | 2\n\n# Title\n```\n<script>alert(1)</script> ![](http://example.org)"
    plain, page = (group_markdown(rewarded_group(texts=(text, "5"))) for text in ("4", hostile))
    assert len(page.splitlines()) == len(plain.splitlines())
    assert r"1 \| 2 \# Title \`\`\` \<script\>alert\(1\)\</script\> \!\[\]\(http://example.org\)" in page


def test_a_table_of_figures_gives_standard_errors():
    figures = {"num_problems": 200.0, "pass@1": 0.25, "pass@1_se": 0.03125}
    assert figures_table(figures).splitlines()[2:] == ["| pass@1 | 0.250 ± 0.031 |"]


def test_a_summary_is_a_row_per_family_and_figure():
    before, after = {"pass@1": 0.25, "pass@1_se": 0.01}, {"pass@1": 0.75, "pass@1_se": 0.02}
    summary = {"seed": 0, "verifiable": {"before": before, "after": after, "seconds": 9.5}}
    rows = summary_table(summary).splitlines()[2:]
    assert rows == ["| verifiable | pass@1 | 0.250 ± 0.010 | 0.750 ± 0.020 |"]


def test_the_report_of_a_run_has_its_ends_its_checkpoints_and_what_people_say():
    steps = [{"reward/mean": i / 20} for i in range(20)]
    history = [steps[0] | {"selection/score": 0.5}, *steps[1:]]
    page = run_markdown(history, 30, None, Accuracy(right=3, wrong=1, unsure=2))
    assert page.startswith("# 20 of 30 steps")
    assert "| reward/mean | 0.225 | 0.725 |" in page  # the means of 0..9 and of 10..19, in twentieths
    assert "| 1 | 0.500 |" in page
    assert "People found **3 of 4** reviewed references right." in page
    assert "Stopped" not in page
    assert "People" not in run_markdown(history, 30, None, Accuracy(0, 0, 1))
    stopped = run_markdown(history, 30, "nothing is left to reconcile", Accuracy(0, 0, 0))
    assert "**Stopped:** nothing is left to reconcile" in stopped


def test_a_person_decides_on_every_reference_as_it_is():
    page = gate_markdown(4, [rewarded_group(reference="a | b <b>"), rewarded_group(reference=None)])
    head, *_, first, second = page.strip().splitlines()
    assert head == "Step 5: 2 of 2 references"
    assert r"a \| b \<b\>" in first
    assert first.count(" | ") == second.count(" | ") == 5
    assert len(json.dumps(gate_markdown(0, [endless_group("<" * 9999)] * 99))) < 2 * MAX_BYTES
