"""References that the anchor writes: it reads the group's rollouts and reconciles them."""

from collections.abc import Sequence

from cat_grpo.config import Config
from cat_grpo.engines import Engines, Sampling
from cat_grpo.method import needs
from cat_grpo.method.prompts import ask, render
from cat_grpo.records import Generation, Group, Reference


@needs("synthesize_{kind}")
async def synthesis(
    groups: Sequence[Group], engines: Engines, config: Config, seeds: Sequence[int]
) -> list[Reference]:
    """The anchor reads all rollouts of a group and writes the reference (CaT eq. 1)."""
    prompts = [synthesis_prompt(group, config) for group in groups]
    setting = config.reference
    sampling = Sampling(max_tokens=setting.max_tokens, temperature=setting.temperature, seeds=seeds)
    generations = await engines.anchor.generate([ask(prompt) for prompt in prompts], sampling)
    return [_reference(prompt, generation) for prompt, generation in zip(prompts, generations, strict=True)]


def synthesis_prompt(group: Group, config: Config) -> str:
    """Returns what the anchor reads: the rollouts, and the question only with `include_question`."""
    return render(
        config.prompts,
        f"synthesize_{group.problem.kind}",
        question=group.problem.question if config.reference.include_question else "",
        rollouts=[rollout.text for rollout in group.rollouts],
    )


def _reference(prompt: str, generation: Generation) -> Reference:
    written = generation.completions[0]
    refused = None if written.text.strip() else "the anchor wrote nothing"
    if written.finish_reason != "stop":
        refused = "it was cut off at reference.max_tokens"
    return Reference(
        text=None if refused else written.text,
        token_ids=written.token_ids,
        written=written.text,
        refused=refused,
        prompt=prompt,
        num_tokens=generation.usage.completion_tokens,
        finish_reason=written.finish_reason,
    )
