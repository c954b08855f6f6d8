"""The plan of a run, for `--dry-run`: how much its config will ask of its models."""

from collections.abc import Sequence
from dataclasses import dataclass

from cat_grpo.config import Config
from cat_grpo.method.cat import asks_anchor
from cat_grpo.method.rewards.judge import VERDICT_MAX_TOKENS
from cat_grpo.records import Problem


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Calls of one stage in one step, and the most new tokens that they may make."""

    stage: str
    calls: int
    max_new_tokens: int


def plan(config: Config, problems: Sequence[Problem]) -> list[StagePlan]:
    """Returns upper bounds for one step, stage by stage, with the data's share of open problems."""
    num_problems, group_size = config.train.problems_per_step, config.rollout.group_size
    with_rubric = ["self_rubric" in config.reward.parts(problem.kind) for problem in problems]
    num_rubrics = round(num_problems * sum(with_rubric) / len(problems))
    num_verdicts = num_rubrics * group_size * config.reward.max_criteria
    synthesised = num_problems if asks_anchor(config) else 0
    stages = [
        ("rollouts", num_problems * group_size, config.rollout.max_tokens),
        ("references", synthesised, config.reference.max_tokens),
        ("rubrics", num_rubrics, config.reward.rubric_max_tokens),
        ("verdicts", num_verdicts, 1 if config.reward.verdict == "label" else VERDICT_MAX_TOKENS),
    ]
    return [StagePlan(stage, calls, calls * max_tokens) for stage, calls, max_tokens in stages]


def plan_markdown(config: Config, problems: Sequence[Problem]) -> str:
    """The plan of the whole run as a markdown table."""
    train = config.train
    epochs = train.steps * train.problems_per_step / len(problems)
    lines = [
        f"{len(problems)} problems, {train.steps} steps of {train.problems_per_step}: {epochs:.1f} epochs, "
        f"{train.problems_per_step * config.rollout.group_size} rollouts per update.",
        "",
        "| stage | calls a step, at most | new tokens a step, at most | calls in all |",
        "|---|--:|--:|--:|",
    ]
    for stage in plan(config, problems):
        counts = (stage.calls, stage.max_new_tokens, stage.calls * train.steps)
        lines.append(f"| {stage.stage} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines)
