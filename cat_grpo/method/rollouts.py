"""Stage 1: the policy makes G rollouts of each problem."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engine, Sampling
from cat_grpo.method.prompts import render
from cat_grpo.records import Group, Messages, Problem


async def generate_rollouts(
    problems: Sequence[Problem], policy: Engine, config: Config, seeds: Sequence[int]
) -> list[Group]:
    """One group per problem, in order; rollout i of a problem depends on (its seed, i) alone."""
    sampling = Sampling(
        max_tokens=config.rollout.max_tokens,
        n=config.rollout.group_size,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        seeds=seeds,
    )
    prompts = [solve_prompt(problem, config.prompts) for problem in problems]
    generations = await policy.generate(prompts, sampling)
    return [
        Group(problem, generation.prompt_token_ids, generation.completions)
        for problem, generation in zip(problems, generations, strict=True)
    ]


def solve_prompt(problem: Problem, prompt_set: str) -> Messages:
    """The conversation as the data have it, its last turn put into the template of the problem's kind."""
    last_turn = render(prompt_set, solve_template(problem.kind), question=problem.question)
    return [*problem.messages[:-1], {"role": "user", "content": last_turn}]


def solve_template(kind: str) -> str:
    return f"solve_{kind}"
