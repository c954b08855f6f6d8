"""Turns records and metrics into pages and tables for people. They stay small, however long the texts are.

A model wrote the texts, so pages escape them. Each text is cut to the widest cell that keeps its page small.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cat_grpo.metrics import SCORE, WINDOW, Metrics, agrees_with_majority, differs_from_all, mean
from cat_grpo.records import Reference, RewardedGroup, RolloutReward
from cat_grpo.report.reviews import Accuracy

T = TypeVar("T")

MAX_BYTES = 24_000
"""Limit of a table's or group's JSON: a dashboard may send all versions of a page to the browser at once."""
MAX_ROWS = 50
MAX_ROLLOUTS = 16
WIDTHS = (1000, 500, 250, 120, 60, 30, 15, 0)
"""Characters of a cell, tried in this order until everything fits."""
SECTIONS = ("validation", "selection", "reward", "consensus", "reference", "rubric", "policy", "time")
HEADLINE = {
    "reward/mean": "Reward",
    "consensus/majority_frac": "majority's share",
    "reference/differs_from_majority_frac": "reference differs from the majority",
    "rubric/satisfied_frac": "criteria met",
    "policy/entropy": "entropy",
}


def step_markdown(
    history: Sequence[Metrics],
    rewarded: Sequence[RewardedGroup],
    num_steps: int,
    alarm: str | None = None,
    warnings: Iterable[str] = (),
) -> str:
    """A page on the history's last step: alarms, headline, one group in full, and then every figure."""
    now, first = history[-1], history[0]
    headline = (
        f"{words} **{_figure(now, name)}** (step 1: {_figure(first, name)})"
        for name, words in HEADLINE.items()
        if name in now
    )
    blocks = [
        f"# Step {len(history)} of {num_steps}",
        *([f"⛔ **Stopped here:** {_escape(alarm)}"] if alarm else []),
        *(f"⚠ **Warning:** {_escape(warning)}" for warning in warnings),
        " · ".join(headline),
        group_markdown(rewarded[0]),
        "## All figures",
        _all_figures(history),
    ]
    return "\n\n".join(blocks) + "\n"


def run_markdown(history: Sequence[Metrics], num_steps: int, alarm: str | None, reviewed: Accuracy) -> str:
    """A page on the whole run: its first and its last steps, its checkpoints and its reviews."""
    first, last = history[:WINDOW], history[-WINDOW:]
    names = [name for name in _means(history[-1]) if not name.startswith(("time/", "engine/", "validation/"))]
    figures = [[name, _late(first, name), _late(last, name)] for name in names if name != "step"]
    checkpoints = [
        [str(step), f"{metrics[SCORE]:.3f}"]
        for step, metrics in enumerate(history, start=1)
        if SCORE in metrics
    ]
    decided = reviewed.right + reviewed.wrong
    blocks = [
        f"# {len(history)} of {num_steps} steps",
        *([f"⛔ **Stopped:** {_escape(alarm)}"] if alarm else []),
        f"People found **{reviewed.right} of {decided}** reviewed references right." if decided else "",
        _table(["", f"first {len(first)} steps", f"last {len(last)} steps"], figures),
        "## Checkpoints",
        _table(["after step", "score"], checkpoints[-MAX_ROWS:]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def group_markdown(group: RewardedGroup) -> str:
    """One problem in full: its reference beside the rollouts that it was made from."""
    return _fitting(lambda width: _group_page(group, width))


def reference_rows(rewarded: Sequence[RewardedGroup]) -> list[dict[str, Any]]:
    """One row per problem, cut as in `table_rows`."""
    return table_rows([_reference_row(group) for group in rewarded[:MAX_ROWS]])


def gate_markdown(step: int, rewarded: Sequence[RewardedGroup]) -> str:
    """The table that a person reads before the references may train the policy."""
    rows = [_reference_row(group) for group in rewarded[:MAX_ROWS]]

    def table(width: int) -> str:
        return _table(
            list(rows[0]), [[_cell(str(_plain(cell, width)), width) for cell in row.values()] for row in rows]
        )

    return f"Step {step + 1}: {len(rows)} of {len(rewarded)} references\n\n{_fitting(table)}\n"


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first MAX_ROWS rows with their texts cut to fit, for a table that shows text as it is."""
    return _fitting(
        lambda width: [{name: _plain(cell, width) for name, cell in row.items()} for row in rows[:MAX_ROWS]]
    )


def metric_words(name: str) -> str:
    """The metric's name in words, without its section and unit."""
    return name.partition("/")[2].removesuffix("_frac").removesuffix("_s").replace("_", " ")


def figures_table(figures: Mapping[str, float]) -> str:
    """The figures of `evaluate` in a table, with their standard errors."""
    return _table(["", "mean ± standard error"], [[name, _figure(figures, name)] for name in _means(figures)])


def summary_table(summary: Mapping[str, Any]) -> str:
    """The figures before and after, for each family of {family: {"before": figures, "after": figures}}."""
    rows = [
        [family, name, _figure(part["before"], name), _figure(part["after"], name)]
        for family, part in summary.items()
        if isinstance(part, Mapping)
        for name in _means(part["before"])
    ]
    return _table(["", "", "before", "after"], rows)


def _all_figures(history: Sequence[Metrics]) -> str:
    """Every figure of the last step beside its late mean and its first value, by section."""
    now, first, recent = history[-1], history[0], history[-WINDOW:]
    rows = []
    for section in SECTIONS:
        members = [name for name in _means(now) if name.startswith(f"{section}/")]
        rows += [[f"**{section}**", "", "", ""]] if members else []
        for name in members:
            rows.append([metric_words(name), _figure(now, name), _late(recent, name), _figure(first, name)])
    return _table(["", "this step", f"mean of {len(recent)}", "step 1"], rows)


def _late(steps: Sequence[Metrics], name: str) -> str:
    """The mean over those of these steps that have the figure."""
    return _figure({name: mean(metrics[name] for metrics in steps if name in metrics)}, name)


def _reference_row(group: RewardedGroup) -> dict[str, Any]:
    rewards = [one.reward for one in group.rewards if one.reward is not None]
    return {
        "prompt": group.group.problem.question,
        "reference": group.reference.text,
        "majority": group.reference.majority,
        "agrees": agrees_with_majority(group),
        "mean reward": round(mean(rewards), 3) if rewards else None,
        "rewarded": f"{len(rewards)} of {len(group.rewards)}",
    }


def _group_page(group: RewardedGroup, width: int) -> str:
    reference = [
        ["**prompt**", _cell(group.group.problem.question, width)],
        ["**reference**", _reference(group.reference, width)],
        ["**majority**", _majority(group, width)],
    ]
    shown = list(zip(group.group.rollouts, group.rewards, strict=True))[:MAX_ROLLOUTS]
    rollouts = [
        [str(i), _cell(rollout.text, width), _reward(reward)]
        for i, (rollout, reward) in enumerate(shown, start=1)
    ]
    num_more = len(group.rewards) - len(shown)
    blocks = [
        f"## One group: {_cell(group.group.problem.id, 60)}",
        _table(["", ""], [row for row in reference if row[1]]),
        _criteria(group, width),
        _table(["", "rollout", "reward"], rollouts),
        f"and {num_more} more rollouts" if num_more > 0 else "",
    ]
    return "\n\n".join(block for block in blocks if block)


def _reference(reference: Reference, width: int) -> str:
    """The reference. When there is none, the reason and what the anchor wrote."""
    if reference.text is not None:
        return _cell(reference.text, width)
    return f"none: {reference.refused} {_cell(reference.written, width)}".rstrip()


def _majority(group: RewardedGroup, width: int) -> str:
    """The most frequent answer and whether the reference agrees; empty without one."""
    reference = group.reference
    if reference.majority is None:
        return ""
    told = f"{_cell(reference.majority, width)} ({reference.num_votes} of {len(group.rewards)})"
    if differs_from_all(group):
        return f"{told}; the reference is in **no rollout**"
    agrees = agrees_with_majority(group)
    return told + {True: "; the reference agrees", False: "; the reference **differs**", None: ""}[agrees]


def _criteria(group: RewardedGroup, width: int) -> str:
    """The rubric, and how many of the rollouts that were judged meet each criterion; empty without one."""
    if group.rubric is None:
        return ""
    judged = [one.verdicts for one in group.rewards if one.verdicts]
    rows = []
    for i, criterion in enumerate(group.rubric.criteria[:MAX_ROWS]):
        read = [verdicts[i].satisfied for verdicts in judged if verdicts[i].satisfied is not None]
        rows.append([_cell(criterion, width), f"{sum(map(bool, read))} of {len(read)}"])
    return _table(["criterion", "met by"], rows)


def _reward(reward: RolloutReward) -> str:
    if reward.reward is None:
        return "not judged"
    return f"{reward.reward:.2f}" + (f" - {reward.penalty:.2f}" if reward.penalty else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _fitting(make: Callable[[int], T]) -> T:
    """The result of `make` with the widest cells that fit."""
    made = (make(width) for width in WIDTHS)
    return next(one for one in made if len(json.dumps(one)) <= MAX_BYTES)


def _plain(cell: Any, width: int) -> Any:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return _cut(cell, width) if isinstance(cell, str) else "" if cell is None else cell


def _cut(text: str, width: int) -> str:
    """The text in one line. A cut text ends with its full length."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width]} … ({len(text)} characters)"


def _cell(text: str, width: int) -> str:
    """Markdown that shows the cut text as it is."""
    return _escape(_cut(text, width))


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&-])", r"\\\1", text)


def _means(figures: Mapping[str, float]) -> list[str]:
    """The names of the figures, without standard errors and counts of problems."""
    return [name for name in figures if not name.endswith(("_se", "num_problems"))]


def _figure(figures: Mapping[str, float], name: str) -> str:
    """The value in its unit, with its standard error where there is one; empty when it is missing."""
    if (value := figures.get(name)) is None:
        return ""
    if f"{name}_se" in figures:
        return f"{value:.3f} ± {figures[f'{name}_se']:.3f}"
    if name.endswith("_frac"):
        return f"{value:.1%}"
    if name.endswith("_s"):
        return f"{value:.1f} s"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
