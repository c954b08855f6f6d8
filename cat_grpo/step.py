"""One step of Compute as Teacher: explore, estimate references, derive rewards, improve the policy.

The only place where the stages meet.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from cat_grpo.batches import Batch, make_batch, rollout_kl, total_rewards
from cat_grpo.checkpoints import Checkpoints
from cat_grpo.config import Config
from cat_grpo.engines import Engine, Engines, together
from cat_grpo.engines.hf import HFEngine, resolve_dtype
from cat_grpo.engines.metered import Meter
from cat_grpo.evaluate import LabelledProblem, evaluate
from cat_grpo.learner import Learner, NotFiniteError, set_aside
from cat_grpo.metrics import Metrics, mean, step_metrics
from cat_grpo.order import Change, ids_of_step, rollout_keys
from cat_grpo.records import Problem, ScoredGroup
from cat_grpo.references import estimate_references
from cat_grpo.rewards import score_groups
from cat_grpo.rollouts import generate_rollouts
from cat_grpo.rundir import RunDir
from cat_grpo.selection import SCORE, alarm, is_best, label_free_score
from cat_grpo.summaries import Values, summarise_update
from cat_grpo.sync import HALF_TOLERANCE, TOLERANCE, Probe, check_sync, send_weights
from cat_grpo.trackers import Tracker

if TYPE_CHECKING:
    from cat_grpo.ranks import Ranks

STAGES = ("rollouts", "references", "scores")

Stage = Callable[..., Awaitable[Any]]
Wrap = Callable[[Stage], Stage]
"""What a caller puts around each stage of a step: a Prefect task, a timer, nothing."""
Accept = Callable[[int], Awaitable[bool]]
"""Whether the step's references may train the policy."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What a training run holds while it runs. Its stages take numbers and leave files."""

    config: Config
    run: RunDir
    problems: Mapping[str, Problem]
    """By id."""
    changes: tuple[Change, ...]
    """Of the data, from the run's first start on."""
    validation: Sequence[LabelledProblem]
    engines: Engines
    learner: "Learner | Ranks"
    live: HFEngine
    """The learner's own module, to be asked."""
    tokenizer: PreTrainedTokenizerBase
    checkpoints: Checkpoints
    probes: Sequence[Probe]
    tracker: Tracker
    opened: AsyncExitStack
    """What `close` is to close."""
    meters: Mapping[str, Meter] = field(default_factory=lambda: {stage: Meter() for stage in STAGES})

    @property
    def next_step(self) -> int:
        """The first step without a checkpoint behind it. Stage files of later steps are used again."""
        return self.checkpoints.latest_step()

    @property
    def num_shards(self) -> int:
        return -(-self.config.train.problems_per_step // self.config.shard_size)

    async def rollouts(self, step: int, shard: int) -> Path:
        """Stage 1 on one shard of the step's problems."""
        path = self.run.stage_file(step, "rollouts", shard)
        if path.exists():
            return path
        chosen, size = self._problems_of(step), self.config.shard_size
        part = slice(shard * size, (shard + 1) * size)
        seeds = [self.run.seed(step, "rollouts", key) for key in rollout_keys(chosen)[part]]
        policy = self._metered("rollouts", self.engines.policy)
        groups = await generate_rollouts(
            chosen[part], policy, self.config.rollout, self.config.prompts, seeds
        )
        return self.run.write_groups(step, shard, groups)

    async def references(self, step: int, shard: int) -> Path:
        """Stage 2 on the shard's groups."""
        path = self.run.stage_file(step, "references", shard)
        if path.exists():
            return path
        groups = self.run.read_groups(step, shard)
        seeds = [self.run.seed(step, "references", group.problem.id) for group in groups]
        references = await estimate_references(
            groups,
            self._metered("references", self.engines.anchor),
            self.config.reference,
            self.config.reward.equivalence,
            self.config.prompts,
            seeds,
        )
        return self.run.write_references(step, shard, references)

    async def scores(self, step: int, shard: int) -> Path:
        """Stage 3 on the shard's groups and references."""
        path = self.run.stage_file(step, "scores", shard)
        if path.exists():
            return path
        scored = await score_groups(
            self.run.read_groups(step, shard),
            self.run.read_references(step, shard),
            self._metered("scores", self.engines.anchor),
            self._metered("scores", self.engines.judge),
            self.config.reward,
            self.config.prompts,
        )
        return self.run.write_scores(step, shard, scored)

    async def update(self, step: int) -> Metrics:
        """Stages 4 and 5 on all shards of the step, and its line of metrics."""
        started = time.monotonic()
        scored = self.run.read_step(step)
        config = self.config.learner
        anchor = await self._logprobs(self.engines.anchor, scored) if config.kl_coef else []
        kl: list[list[float]] = []
        if anchor and config.kl_in == "reward":  # and then not in the loss
            kl, anchor = rollout_kl(await self._logprobs(self.engines.policy, scored), anchor, config), []
        rewards = total_rewards(scored, kl, config.kl_coef)
        batch = make_batch(scored, rewards, config, self.config.rollout.max_tokens, anchor)
        try:
            if not all(math.isfinite(value) for group in kl for value in group):
                raise NotFiniteError("the KL is not finite")  # as a reward it would pass for a missing one
            update = await asyncio.to_thread(self.learner.update, batch) if batch.rows else {"rows": 0.0}
        except NotFiniteError as error:
            path = self.run.step_folder(step) / "rejected_batch.pt"
            torch.save(set_aside(batch.rows), path)
            raise NotFiniteError(f"step {step}: {error}; the batch is in {path}") from error
        metrics = {"step": float(step), **step_metrics(scored, rewards)}
        metrics |= {f"policy/{name}": value for name, value in update.items()}
        self.run.write_summaries(step, summarise_update(scored, kl, *_by_group(scored, rewards, batch)))
        if kl:
            metrics["policy/kl"] = mean(value for group in kl for value in group)
        metrics["time/update_s"] = time.monotonic() - started
        if update.get("rows_with_signal"):
            metrics |= await self.sync()
        return self._write_line(step, metrics)

    async def skip(self, step: int) -> Metrics:
        """In place of the update, where a person has refused the step's references: the weights stay."""
        scored, config = self.run.read_step(step), self.config
        rewards = total_rewards(scored, [], config.learner.kl_coef)
        batch = make_batch(scored, rewards, config.learner, config.rollout.max_tokens, [])
        self.run.write_summaries(step, summarise_update(scored, [], *_by_group(scored, rewards, batch)))
        skipped = {"step": float(step), **step_metrics(scored, rewards), "policy/skipped": 1.0}
        return self._write_line(step, skipped)

    async def sync(self) -> Metrics:
        """The policy's engine has the learner's weights, and is proven to. SyncError where it has not."""
        if self.engines.policy is self.live:
            return {}
        started = time.monotonic()
        dtype = resolve_dtype(self.config.model)
        await send_weights(self.live.model, self.engines.policy, dtype, self.run.path / "weights")
        tolerance = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
        gap = await check_sync(self.live, self.engines.policy, self.probes, tolerance)
        return {"policy/sync_gap": gap, "time/sync_s": time.monotonic() - started}

    async def checkpoint(self, step: int) -> Path:
        """Weights and optimizer after this step; marked as the best when its score is."""
        history = self.run.metrics()
        history[-1] |= await self._selection_metrics(history)
        self.run.write_metrics(history)
        how_asked = self.config.model_dump(mode="json", include={"prompts", "rollout", "reference", "reward"})
        card = {"anchor": self.config.model.path, "config": how_asked}
        best = is_best(history) and alarm(history, self.config.train) is None
        return self.checkpoints.save(step + 1, self.learner, self.tokenizer, card, best)

    async def close(self) -> None:
        """All that was opened for it, whatever one part of it raises."""
        await self.opened.aclose()

    def _problems_of(self, step: int) -> list[Problem]:
        """ValueError where the data no longer has what a step began with."""
        train = self.config.train
        ids = ids_of_step(self.changes, step, train.problems_per_step, train.seed)
        if gone := [name for name in ids if name not in self.problems]:
            raise ValueError(f"{self.config.data.path}: {gone[0]}: step {step} began with it, and it is gone")
        return [self.problems[name] for name in ids]

    def _write_line(self, step: int, metrics: Metrics) -> Metrics:
        for stage, meter in self.meters.items():
            metrics |= {f"engine/{stage}_{name}": value for name, value in meter.read().items()}
        self.run.write_metrics([*self.run.metrics()[:step], metrics])
        return metrics

    def _metered(self, stage: str, engine: Engine) -> Engine:
        return self.meters[stage].on(engine)

    async def _selection_metrics(self, history: Sequence[Metrics]) -> Metrics:
        if not self.validation:
            return {SCORE: label_free_score(history, self.config.train.checkpoint_every)}
        figures = await evaluate(self.validation, self.engines, self.config)
        scores = [figures[name] for name in ("pass@1", "points_f1") if name in figures]
        return {SCORE: mean(scores)} | {f"validation/{name}": value for name, value in figures.items()}

    async def _logprobs(self, engine: Engine, scored: Sequence[ScoredGroup]) -> list[list[tuple[float, ...]]]:
        """The engine's logprobs of the rollouts' tokens, at temperature 1: (P, G)."""
        rollouts = [
            (s.group.prompt_token_ids, rollout.token_ids) for s in scored for rollout in s.group.rollouts
        ]
        logprobs = iter(await engine.score(*zip(*rollouts, strict=True)))
        return [[next(logprobs) for _ in s.group.rollouts] for s in scored]


def _by_group(scored: Sequence[ScoredGroup], rewards: torch.Tensor, batch: Batch) -> tuple[Values, Values]:
    """What the rollouts' advantages are made of, and the advantages: None where there is no reward."""
    advantages = iter(row.advantage for row in batch.rows)
    judged = [[score.reward is not None for score in group.scores] for group in scored]
    return (
        [
            [reward if is_judged else None for reward, is_judged in zip(*row, strict=True)]
            for row in zip(rewards.tolist(), judged, strict=True)
        ],
        [[next(advantages) if is_judged else None for is_judged in row] for row in judged],
    )


def _on_shards(stage: Stage, num_shards: int, done: asyncio.Queue[int], made: asyncio.Queue[int]) -> Stage:
    """The stage on each shard that the stage before is done with, at once; `made` is for the next stage."""

    async def on_shard(step: int) -> None:
        shard = await done.get()
        await stage(step, shard)
        made.put_nowait(shard)

    async def on_shards(step: int) -> None:
        await together(on_shard(step) for _ in range(num_shards))

    on_shards.__name__ = stage.__name__
    return on_shards


async def _from_first(stage: Stage, step: int, done: asyncio.Queue[int]) -> None:
    """Begins with the first shard: who times the stage does not count the wait for it."""
    done.put_nowait(await done.get())
    await stage(step)


async def train_step(
    loop: Loop, step: int, wrap: Wrap = lambda stage: stage, accept: Accept | None = None
) -> Metrics:
    """The figure of the paper in code. Every shard walks the stages on its own; the update waits for all.

    And for `accept`, where there is one: a step that it refuses ends without an update.
    """
    stages, num_shards = (loop.rollouts, loop.references, loop.scores), loop.num_shards
    queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(len(stages) + 1)]
    for shard in range(num_shards):
        queues[0].put_nowait(shard)
    # Where one fails, the others stop before the engines are closed under them.
    await together(
        _from_first(wrap(_on_shards(stage, num_shards, done, made)), step, done)
        for stage, done, made in zip(stages, queues, queues[1:], strict=False)
    )
    is_accepted = accept is None or await accept(step)
    metrics = await wrap(loop.update if is_accepted else loop.skip)(step)
    finished = step + 1
    if finished % loop.config.train.checkpoint_every == 0 or finished == loop.config.train.steps:
        await wrap(loop.checkpoint)(step)
    loop.tracker.log(loop.run.metrics()[-1], finished)
    return metrics
