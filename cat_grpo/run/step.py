"""One step of Compute as Teacher: explore, estimate references, derive rewards, improve the policy."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cat_grpo.config import Config
from cat_grpo.engines import Engine, Engines, together
from cat_grpo.engines.hf import HFEngine, resolve_dtype
from cat_grpo.engines.metered import Meter
from cat_grpo.engines.sync import HALF_TOLERANCE, TOLERANCE, Probe, check_sync, send_weights
from cat_grpo.errors import BadInput
from cat_grpo.evaluation import LabelledProblem, measure
from cat_grpo.learner import TrainsPolicy
from cat_grpo.learner.batches import Batch, make_batch, rollout_kl, total_rewards
from cat_grpo.learner.grpo import group_advantages
from cat_grpo.learner.learner import NotFiniteError, set_aside
from cat_grpo.method import cat
from cat_grpo.method.equivalence import read_timeouts
from cat_grpo.metrics import SCORE, Metrics, mean, step_metrics
from cat_grpo.records import Problem, RewardedGroup
from cat_grpo.report.summaries import summarise_update
from cat_grpo.report.trackers import Tracker
from cat_grpo.run.checkpoints import Checkpoints
from cat_grpo.run.observing import Observer, Telling
from cat_grpo.run.order import ProblemOrder, rollout_keys
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.stopping import alarm, is_best, label_free_score

STAGES = ("rollouts", "references", "rewards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Holds what a training run needs while it runs. Its stages take numbers and leave files."""

    config: Config
    run: RunDir
    problems: Mapping[str, Problem]
    """The problems by id."""
    order: ProblemOrder
    validation: Sequence[LabelledProblem]
    engines: Engines
    learner: TrainsPolicy
    live: HFEngine
    """An engine that answers with the learner's own module."""
    tokenizer: PreTrainedTokenizerBase
    checkpoints: Checkpoints
    probes: Sequence[Probe]
    tracker: Tracker
    history: list[Metrics]
    """One line per finished step."""
    meters: Mapping[str, Meter] = field(default_factory=lambda: {stage: Meter() for stage in STAGES})

    @property
    def next_step(self) -> int:
        """The first step after the latest checkpoint. Stage files of later steps are used again."""
        return self.checkpoints.latest_step()

    @property
    def num_shards(self) -> int:
        return -(-self.config.train.problems_per_step // self.config.shard_size)

    async def rollouts(self, step: int, shard: int) -> Path:
        """Runs stage 1 on one shard of the step's problems."""
        path = self.run.stage_file(step, "rollouts", shard)
        if path.exists():
            return path
        chosen, size = self._problems_of(step), self.config.shard_size
        part = slice(shard * size, (shard + 1) * size)
        seeds = [self.run.seed(step, "rollouts", key) for key in rollout_keys(chosen)[part]]
        groups = await cat.explore(chosen[part], self._metered("rollouts"), self.config, seeds)
        return self.run.write_groups(step, shard, groups)

    async def references(self, step: int, shard: int) -> Path:
        """Runs stage 2 on the shard's groups."""
        path = self.run.stage_file(step, "references", shard)
        if path.exists():
            return path
        groups = self.run.read_groups(step, shard)
        seeds = [self.run.seed(step, "references", group.problem.id) for group in groups]
        references = await cat.estimate(groups, self._metered("references"), self.config, seeds)
        return self.run.write_references(step, shard, references)

    async def rewards(self, step: int, shard: int) -> Path:
        """Runs stage 3 on the shard's groups and references."""
        path = self.run.stage_file(step, "rewards", shard)
        if path.exists():
            return path
        groups, references = self.run.read_groups(step, shard), self.run.read_references(step, shard)
        seeds = [self.run.seed(step, "rewards", group.problem.id) for group in groups]
        engines = self._metered("rewards")
        rewarded = await cat.derive(groups, references, engines, self.config, seeds)
        return self.run.write_rewards(step, shard, rewarded)

    async def update(self, step: int) -> Metrics:
        """Runs stages 4 and 5 on all shards of the step. Returns its line of the history."""
        started = time.monotonic()
        rewarded, config = self.run.read_step(step), self.config.learner
        anchor = await self._logprobs(self.engines.anchor, rewarded) if config.kl_coef else []
        kl: list[list[float]] = []
        if anchor and config.kl_in == "reward":  # and then not in the loss
            kl, anchor = rollout_kl(await self._logprobs(self.engines.policy, rewarded), anchor, config), []
        rewards = total_rewards(rewarded, kl, config.kl_coef)
        advantages = group_advantages(rewards, config.advantage_scale)
        batch = make_batch(rewarded, advantages, config, self.config.rollout.max_tokens, anchor)
        update = await self._update(step, batch, kl)
        metrics = step_metrics(rewarded, rewards) | {
            f"policy/{name}": value for name, value in update.items()
        }
        if kl:
            metrics["policy/kl"] = mean(value for group in kl for value in group)
        self._summarise(step, rewarded, kl, rewards, advantages)
        metrics["time/update_s"] = time.monotonic() - started
        if update.get("rows_with_signal"):
            metrics |= await self.sync()
        return self._line(step, metrics)

    async def skip(self, step: int) -> Metrics:
        """Replaces the update where a person refused the step's references: the weights stay."""
        rewarded = self.run.read_step(step)
        rewards = total_rewards(rewarded, [], self.config.learner.kl_coef)
        advantages = group_advantages(rewards, self.config.learner.advantage_scale)
        self._summarise(step, rewarded, [], rewards, advantages)
        return self._line(step, {**step_metrics(rewarded, rewards), "policy/skipped": 1.0})

    async def sync(self) -> Metrics:
        """Gives the policy's engine the learner's weights. SyncError where it is not proven to have them."""
        if self.engines.policy is self.live:
            return {}
        started = time.monotonic()
        dtype = resolve_dtype(self.config.model)
        await send_weights(self.live.model, self.engines.policy, dtype, self.run.path / "weights")
        tolerance = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
        gap = await check_sync(self.live, self.engines.policy, self.probes, tolerance)
        return {"policy/sync_gap": gap, "time/sync_s": time.monotonic() - started}

    async def checkpoint(self, step: int) -> Path:
        """Saves weights and optimizer after the history's last step, marked as the best when its score is.

        The step's line is written first: a checkpoint has all the lines of its steps.
        """
        self.history[-1] |= await self._selection_metrics()
        self.run.add_metrics(self.history[-1])
        how_asked = self.config.model_dump(mode="json", include={"prompts", "rollout", "reference", "reward"})
        card = {"anchor": self.config.model.path, "config": how_asked}
        best = is_best(self.history) and alarm(self.history, self.config.train) is None
        return self.checkpoints.save(step + 1, self.learner, self.tokenizer, card, best)

    def _problems_of(self, step: int) -> list[Problem]:
        """BadInput where the data no longer has what a step began with."""
        ids = self.order.ids_of(step)
        if gone := [name for name in ids if name not in self.problems]:
            raise BadInput(f"{self.config.data.path}: {gone[0]}: step {step} began with it, and it is gone")
        return [self.problems[name] for name in ids]

    def _metered(self, stage: str) -> Engines:
        on, engines = self.meters[stage].on, self.engines
        return Engines(on(engines.policy), on(engines.anchor), on(engines.judge))

    async def _update(self, step: int, batch: Batch, kl: Sequence[Sequence[float]]) -> dict[str, float]:
        """Returns the learner's figures. NotFiniteError names the file that then holds the batch."""
        try:
            if not all(math.isfinite(value) for group in kl for value in group):
                raise NotFiniteError("the KL is not finite")  # as a reward it would pass for a missing one
            return await asyncio.to_thread(self.learner.update, batch) if batch.rows else {"rows": 0.0}
        except NotFiniteError as error:
            path = self.run.step_folder(step) / "rejected_batch.pt"
            torch.save(set_aside(batch.rows), path)
            raise NotFiniteError(f"step {step}: {error}; the batch is in {path}") from error

    def _summarise(
        self,
        step: int,
        rewarded: Sequence[RewardedGroup],
        kl: Sequence[Sequence[float]],
        rewards: Tensor,
        advantages: Tensor,
    ) -> None:
        judged = (~rewards.isnan()).tolist()
        totals, moved = (
            [
                [value if is_judged else None for value, is_judged in zip(*row, strict=True)]
                for row in zip(values.tolist(), judged, strict=True)
            ]
            for values in (rewards, advantages)
        )
        self.run.write_summaries(step, summarise_update(rewarded, kl, totals, moved))

    def _line(self, step: int, metrics: Metrics) -> Metrics:
        """Returns the step's line of the history, with the figures of its engines."""
        line = {"step": float(step), **metrics}
        if timeouts := read_timeouts():
            line["consensus/timeouts"] = float(timeouts)
        for stage, meter in self.meters.items():
            line |= {f"engine/{stage}_{name}": value for name, value in meter.read().items()}
        return line

    async def _selection_metrics(self) -> Metrics:
        if not self.validation:
            return {SCORE: label_free_score(self.history, self.config.train.checkpoint_every)}
        figures = await measure(self.validation, self.engines, self.config)
        scores = [figures[name] for name in ("pass@1", "points_f1") if name in figures]
        return {SCORE: mean(scores)} | {f"validation/{name}": value for name, value in figures.items()}

    async def _logprobs(
        self, engine: Engine, rewarded: Sequence[RewardedGroup]
    ) -> list[list[tuple[float, ...]]]:
        """The engine's logprobs of the rollouts' tokens, at temperature 1: (P, G)."""
        prompts = [one.group.prompt_token_ids for one in rewarded for _ in one.group.rollouts]
        completions = [rollout.token_ids for one in rewarded for rollout in one.group.rollouts]
        logprobs = iter(await engine.logprobs(prompts, completions))
        return [[next(logprobs) for _ in one.group.rollouts] for one in rewarded]


async def run_step(loop: Loop, step: int, observer: Observer) -> Metrics:
    """Runs the paper's figure: every shard passes the stages by itself, and the update waits for all."""
    named = {"rollouts": loop.rollouts, "references": loop.references, "rewards": loop.rewards}
    stages = [(stage, Telling(observer, name, step, loop.num_shards)) for name, stage in named.items()]

    async def walk(shard: int) -> None:
        for stage, telling in stages:
            with telling.of_shard():
                await stage(step, shard)

    try:  # where one shard fails, the others stop before the engines are closed under them
        await together(walk(shard) for shard in range(loop.num_shards))
    except BaseException as error:
        for _, telling in stages:
            telling.end(error)
        raise
    if await observer.accepts(loop.run, step):
        with Telling(observer, "update", step).of_shard():
            return await loop.update(step)
    with Telling(observer, "skip", step).of_shard():
        return await loop.skip(step)
