"""Stage 2: a group of rollouts becomes one pseudo-reference (CaT, section 3.1)."""

import asyncio
from collections.abc import Sequence

from cat_grpo.answers import Vote, extract_answer, majority, same_answer
from cat_grpo.config import Equivalence, ReferenceConfig
from cat_grpo.engines import Engine, Sampling
from cat_grpo.prompts import render
from cat_grpo.records import Generation, Group, Message, Reference


async def estimate_references(
    groups: Sequence[Group],
    anchor: Engine,
    config: ReferenceConfig,
    equivalence: Equivalence,
    prompt_set: str,
    seeds: Sequence[int],
) -> list[Reference]:
    """One reference per group, in order; `text` is None where the aggregator gave nothing usable.

    ValueError for the majority of an open problem: there is no final answer to count.
    """
    same = same_answer(equivalence)
    votes = [await asyncio.to_thread(majority, rollout_answers(group), same) for group in groups]
    if config.aggregator == "majority":
        return [_majority_reference(group, vote) for group, vote in zip(groups, votes, strict=True)]
    prompts = [synthesis_prompt(group, config, prompt_set) for group in groups]
    turns: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, seeds=seeds)
    generations = await anchor.generate(turns, sampling)
    return [
        _synthesised_reference(group, vote, prompt, generation)
        for group, vote, prompt, generation in zip(groups, votes, prompts, generations, strict=True)
    ]


def rollout_answers(group: Group) -> list[str | None]:
    """The final answer of each rollout: None where there is none, or the rollout was cut off before it."""
    if group.problem.kind == "open":
        return [None] * len(group.rollouts)
    return [extract_answer(r.text) if r.finish_reason == "stop" else None for r in group.rollouts]


def synthesis_prompt(group: Group, config: ReferenceConfig, prompt_set: str) -> str:
    """What the anchor reads (CaT eq. 1): the rollouts, and not the question unless it is asked for."""
    return render(
        prompt_set,
        f"synthesize_{group.problem.kind}",
        question=group.problem.question if config.include_question else "",
        rollouts=[rollout.text for rollout in group.rollouts],
    )


def _synthesised_reference(group: Group, vote: Vote, prompt: str, generation: Generation) -> Reference:
    completion = generation.completions[0]
    finished = completion.finish_reason == "stop" and completion.text.strip() != ""
    answered = group.problem.kind == "open" or extract_answer(completion.text) is not None
    return Reference(
        problem_id=group.problem.id,
        text=completion.text if finished and answered else None,
        aggregator="synthesis",
        prompt=prompt,
        num_tokens=generation.usage.completion_tokens,
        finish_reason=completion.finish_reason,
        majority=vote.answer,
        num_votes=vote.num_votes,
    )


def _majority_reference(group: Group, vote: Vote) -> Reference:
    if group.problem.kind == "open":
        raise ValueError(f"problem {group.problem.id}: aggregator 'majority' needs a verifiable problem")
    return Reference(
        problem_id=group.problem.id,
        text=None if vote.answer is None else rf"\boxed{{{vote.answer}}}",
        aggregator="majority",
        prompt="",
        num_tokens=0,
        finish_reason=None,
        majority=vote.answer,
        num_votes=vote.num_votes,
    )
