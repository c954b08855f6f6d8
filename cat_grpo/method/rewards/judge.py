"""The judge answers yes or no to one criterion about one rollout: read off its next token, or written."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engine, NoLogprobsError, Sampling
from cat_grpo.errors import BadInput
from cat_grpo.method.prompts import ask, render
from cat_grpo.method.rewards.parsing import parse_verdict
from cat_grpo.records import LabelRead, Verdict

LABELS = ("yes", "no")
VERDICT_MAX_TOKENS = 64


async def judge_criteria(
    questions: Sequence[tuple[str, str]], judge: Engine, config: Config
) -> list[Verdict]:
    """One verdict per (rollout, criterion), in order.

    Keep the criteria of one rollout together: their prompts share all but the end, which a prefix cache
    computes once.
    """
    prompts = [
        ask(render(config.prompts, f"judge_{config.reward.verdict}", rollout=rollout, criterion=criterion))
        for rollout, criterion in questions
    ]
    if config.reward.verdict == "label":
        reads = await judge.read_labels(prompts, LABELS)
        return [_label_verdict(read, config.reward.min_label_mass) for read in reads]
    generations = await judge.generate(prompts, Sampling(max_tokens=VERDICT_MAX_TOKENS, temperature=0.0))
    return [Verdict(parse_verdict(generation.completions[0].text), None) for generation in generations]


async def refuse_silent_judge(judge: Engine, config: Config) -> None:
    """BadInput where verdicts are to be read off probabilities and the judge's server tells none."""
    prompt = render(config.prompts, "judge_label", rollout="yes", criterion="yes")
    needed = "reward.verdict: label needs a judge that tells probabilities of tokens; xml does not"
    try:
        [read] = await judge.read_labels([ask(prompt)], LABELS)
    except NoLogprobsError as error:
        raise BadInput(f"{needed}: {error}") from error
    if not read.is_told:
        raise BadInput(f"{needed}: none came back")


def _label_verdict(read: LabelRead, min_mass: float) -> Verdict:
    yes, no = read.probabilities
    if read.mass < min_mass or read.mass == 0.0:
        return Verdict(None, None)
    return Verdict(None if yes == no else yes > no, yes / read.mass)
