"""Runs for the tests of the inspector: small, and with the most hostile texts that a model could write."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
from cat_grpo.report.summaries import summarise_update
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import load_config

GROUP_SIZE, SHARD_SIZE = 4, 2
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>",
    "</style></textarea></title><svg onload=alert(4)>]]>{{7*7}}{% raw %}<!--",
    "\u202egnp.exe\u2066 \x00 \\(\\text{</math><script>alert(5)</script>}\\)",
    "$\\href{javascript:alert(6)}{x}$ $\\style{background:url(//example.org)}{y}$ \\boxed{<b>}",
    "$$\\begin{matrix}</mtext></math><img src=x onerror=alert(7)>\\end{matrix}$$ $\\unknown{<i>}$",
    "\"onmouseover='alert(8)' autofocus onfocus=alert(9) x=\"",
)
HOSTILE_NAME = "<img src=x onerror=alert(10)> {{7*7}} \u202eevil"
FORMULAS = ('=HYPERLINK("http://example.org")', "+1", "-1+2", "@SUM(A1)", "\t=1")


def rollout(text: str, num_tokens: int = 3, finish_reason: str = "stop") -> Completion:
    tokens = tuple(range(num_tokens))
    return Completion(text, tokens, (-0.5,) * num_tokens, finish_reason)  # pyright: ignore


def verifiable(name: str, prompt: str, answers: Sequence[str], reference: str | None) -> RewardedGroup:
    """A group whose rollouts box their answers; the reference boxes its own."""
    problem = Problem(name, ({"role": "user", "content": prompt},), "verifiable")
    rollouts = tuple(rollout(f"It is \\boxed{{{answer}}}.") for answer in answers)
    majority = max(answers, key=answers.count)
    text = None if reference is None else f"So it is \\boxed{{{reference}}}."
    agrees = [None if reference is None else answer == reference for answer in answers]
    values = [None if agree is None else float(agree) for agree in agrees]
    rewards = tuple(
        RolloutReward(value, parts={"agreement": value}, agrees=agree, answer=answer)
        for value, agree, answer in zip(values, agrees, answers, strict=True)
    )
    estimated = Reference(
        text,
        answer=reference,
        written=text or "I <think> so & so.",
        refused=None if text else "it has no final answer",
        prompt="What the anchor read",
        num_tokens=5,
        finish_reason="stop",
        problem_id=name,
        estimator="synthesis",
        majority=majority,
        num_votes=answers.count(majority),
    )
    return RewardedGroup(Group(problem, (1, 2), rollouts), estimated, None, rewards)


def judged(name: str, prompt: str, texts: Sequence[str], criteria: Sequence[str]) -> RewardedGroup:
    """An open group: of the verdicts on a rollout the first abstains; the first rollout was cut off."""
    problem = Problem(name, ({"role": "user", "content": prompt},), "open")
    verdicts = (Verdict(None, None), *(Verdict(True, 0.9) for _ in criteria[1:]))
    rewards = tuple(
        RolloutReward(0.25 * i, 0.5 * (i == 1), {"self_rubric": 0.25 * i}, verdicts=verdicts)
        for i, _ in enumerate(texts)
    )
    rollouts = tuple(rollout(text, 10 + i, "stop" if i else "length") for i, text in enumerate(texts))
    reference = Reference(
        texts[0],
        written=texts[0],
        prompt=texts[0],
        num_tokens=5,
        finish_reason="stop",
        problem_id=name,
        estimator="synthesis",
    )
    return RewardedGroup(Group(problem, (1, 2), rollouts), reference, Rubric(tuple(criteria)), rewards)


def plain_groups() -> list[RewardedGroup]:
    """Five groups, one for each of the things that a person filters by."""
    return [
        verifiable("agrees", "What is one and one?", ["2", "2", "2", "3"], "2"),
        verifiable("differs from the majority", "Add 1 and 2", ["4", "4", "4", "3"], "3"),
        verifiable("differs from all", "Add 2 and 2", ["5", "5", "6", "7"], "4"),
        verifiable("no reference", "Add 3 and 2", ["1", "2", "3", "4"], None),
        judged(
            "open", "Write a note on ÄPFEL", ["a b", "a c", "a d", "a e"], ["Is it kind?", "Is it short?"]
        ),
    ]


def hostile_groups() -> list[RewardedGroup]:
    groups = [judged(text, text, [text, *HOSTILE[:3]], HOSTILE) for text in HOSTILE]
    return [
        *groups,
        *(verifiable(text, text, [text, text, "1", "2"], text) for text in (*HOSTILE, *FORMULAS)),
    ]


def make_run(path: Path, groups: Sequence[RewardedGroup], num_steps: int = 2, finished: int = 2) -> RunDir:
    """A run whose first `finished` steps have their update behind them; all have the same groups."""
    few = (f"train.shard_size={SHARD_SIZE}", f"rollout.group_size={GROUP_SIZE}", "learner.kl_coef=0.5")
    run = RunDir.open(path, load_config("lab-open", overrides=few), [group.group.problem for group in groups])
    for step in range(num_steps):
        for shard in range(-(-len(groups) // SHARD_SIZE)):
            write_shard(run, step, shard, groups)
        if step < finished:
            write_update(run, step, groups)
    return run


def write_shard(run: RunDir, step: int, shard: int, groups: Sequence[RewardedGroup]) -> None:
    part = groups[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
    run.write_groups(step, shard, [group.group for group in part])
    run.write_references(step, shard, [group.reference for group in part])
    run.write_rewards(step, shard, part)


def write_update(run: RunDir, step: int, groups: Sequence[RewardedGroup]) -> None:
    kl = [[0.25 * i for i, _ in enumerate(group.rewards)] for group in groups]
    totals = [[reward.reward for reward in group.rewards] for group in groups]
    summaries = summarise_update(groups, kl, totals, totals)
    run.write_summaries(step, [replace(summary, group=i) for i, summary in enumerate(summaries)])
    metrics = {"step": float(step), "reward/mean": 0.25 + step / 8, "reward/std": 0.4, "policy/kl": 0.1}
    run.cut_metrics(step)
    run.add_metrics(metrics)
