"""Rubrics and verdicts: the anchor proposes yes/no criteria from a reference, the judge answers them.

Model output is untrusted: it is read by a hardened XML parser or as the probabilities of two labels, and
what cannot be read is None. None is never a no.
"""

import logging
import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from cat_grpo.config import RewardConfig
from cat_grpo.engines import Engine, NoLogprobsError, Sampling
from cat_grpo.prompts import render
from cat_grpo.records import LabelRead, Message, Rubric, Verdict

log = logging.getLogger(__name__)

LABELS = ("yes", "no")
VERDICT_MAX_TOKENS = 64


async def propose_rubrics(
    references: Sequence[str], anchor: Engine, config: RewardConfig, prompt_set: str
) -> list[Rubric | None]:
    """One rubric per reference, in order, from the reference alone (CaT eq. 3).

    None where the text was cut off, is not XML, or has fewer criteria than `min_criteria`.
    """
    prompts = [_ask(render(prompt_set, "propose_rubric", reference=reference)) for reference in references]
    sampling = Sampling(max_tokens=config.rubric_max_tokens, temperature=0.0)
    rubrics = []
    for generation in await anchor.generate(prompts, sampling):
        rubric = parse_rubric(generation.completions[0].text)
        usable = rubric is not None and len(rubric.criteria) >= config.min_criteria
        rubrics.append(Rubric(rubric.criteria[: config.max_criteria]) if rubric and usable else None)
    return rubrics


async def judge_criteria(
    questions: Sequence[tuple[str, str]], judge: Engine, config: RewardConfig, prompt_set: str
) -> list[Verdict]:
    """One verdict per (rollout, criterion), in order.

    Keep the criteria of one rollout together: their prompts share all but the end, which a prefix cache
    computes once.
    """

    def prompts(template: str) -> list[list[Message]]:
        return [
            _ask(render(prompt_set, template, rollout=rollout, criterion=criterion))
            for rollout, criterion in questions
        ]

    if config.verdict == "label":
        try:
            reads = await judge.read_labels(prompts("judge_label"), LABELS)
            return [_label_verdict(read, config.min_label_mass) for read in reads]
        except NoLogprobsError as error:
            log.warning("the judge writes its verdicts: %s", error)
    sampling = Sampling(max_tokens=VERDICT_MAX_TOKENS, temperature=0.0)
    generations = await judge.generate(prompts("judge_xml"), sampling)
    return [Verdict(parse_verdict(generation.completions[0].text), None) for generation in generations]


def parse_rubric(text: str) -> Rubric | None:
    """The criteria of the last `<rubric>` in a text, without repetitions; None when there is none to read."""
    rubric = _last_element(text, "rubric")
    if rubric is None:
        return None
    criteria = (" ".join("".join(child.itertext()).split()) for child in rubric.iter("criterion"))
    distinct = tuple(dict.fromkeys(criterion for criterion in criteria if criterion))
    return Rubric(distinct) if distinct else None


def parse_verdict(text: str) -> bool | None:
    """Yes or no of the last `<verdict>` in a text; None when it says neither."""
    verdict = _last_element(text, "verdict")
    if verdict is None:
        return None
    return {"yes": True, "no": False}.get("".join(verdict.itertext()).strip().lower())


def _label_verdict(read: LabelRead, min_mass: float) -> Verdict:
    yes, no = read.probabilities
    if read.mass < min_mass or read.mass == 0.0:
        return Verdict(None, None)
    return Verdict(None if yes == no else yes > no, yes / read.mass)


def _last_element(text: str, tag: str) -> Element | None:
    """The last `<tag>...</tag>` of a text, parsed; None when there is none, or it is not well-formed XML."""
    found = re.findall(rf"<{tag}>(?:(?!<{tag}>).)*?</{tag}>", text, flags=re.DOTALL)
    if not found:
        return None
    try:
        return fromstring(found[-1])
    except (ParseError, DefusedXmlException, UnicodeEncodeError):  # the last: half of a surrogate pair
        return None


def _ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
