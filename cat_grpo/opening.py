"""A training run is opened: what it reads is checked, its models are loaded, and it begins or goes on."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from cat_grpo.checkpoints import Checkpoints
from cat_grpo.config import Config, DataConfig
from cat_grpo.data import load_problems
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer, resolve_dtype
from cat_grpo.engines.roles import open_roles, refuse_untrainable
from cat_grpo.engines.tokens import model_folder
from cat_grpo.evaluate import load_labelled
from cat_grpo.learner import Learner
from cat_grpo.lora import add_adapters, has_adapters
from cat_grpo.records import Problem
from cat_grpo.reviews import REVIEWS, read_reviews, wrong_problems
from cat_grpo.rollouts import solve_prompt
from cat_grpo.rundir import RunDir
from cat_grpo.step import Loop
from cat_grpo.sync import make_probes
from cat_grpo.trackers import open_tracker

if TYPE_CHECKING:
    from cat_grpo.ranks import Ranks

log = logging.getLogger(__name__)

NUM_PROBES = 8


async def open_loop(config: Config, run_path: Path, secrets: Mapping[str, str] | None = None) -> Loop:
    """A new run, or the one in `run_path` from its latest checkpoint on; `secrets` as the engines want them.

    ValueError for unusable input.
    """
    refuse_untrainable(config)
    problems = load_problems(config.data)
    validation = (
        load_labelled(Path(config.train.validation), config.train.validation_limit)
        if config.train.validation
        else []
    )
    lora_rank = config.learner.lora_rank
    # Weights that are trained are kept in float32; beside adapters they are only computed with.
    model, tokenizer = load_model_and_tokenizer(config.model, None if lora_rank else torch.float32)
    if has_adapters(model):
        raise ValueError(f"model {config.model.path!r}: is adapters: cat-grpo export makes a model of them")
    if lora_rank:
        add_adapters(model, lora_rank, config.learner.lora_alpha, config.train.seed)
    run = RunDir.open(run_path, config, problems)
    changes = run.take_in(_trained_on(problems, config.data, run.path))
    checkpoints = Checkpoints(run.checkpoints)
    live = HFEngine(model, tokenizer, config.model)
    probes = make_probes(
        [
            (f"the prompt of problem {problem.id}", live.tokens.encode(solve_prompt(problem, config.prompts)))
            for problem in problems[:NUM_PROBES]
        ]
    )
    async with AsyncExitStack() as undo:
        undo.push_async_callback(live.close)
        learner = _open_learner(model, config)
        undo.callback(learner.close)
        if checkpoints.latest_step():
            checkpoints.restore(learner)
        tracker = open_tracker(
            config.train.tracker, run.path, config.model_dump(mode="json"), checkpoints.latest_step()
        )
        undo.callback(tracker.close)
        engines = await open_roles(config, live, secrets or {})
        undo.push_async_callback(engines.close)
        loop = Loop(
            config,
            run,
            {problem.id: problem for problem in problems},
            changes,
            validation,
            engines,
            learner,
            live,
            tokenizer,
            checkpoints,
            probes,
            tracker,
            undo.pop_all(),
        )
        undo.push_async_callback(loop.close)
        await loop.sync()
        undo.pop_all()
    return loop


def _trained_on(problems: Sequence[Problem], config: DataConfig, run_path: Path) -> list[str]:
    """The ids of the problems, those left out whose reference was found wrong. ValueError if that is all."""
    reviews = {None: None, "own": run_path / REVIEWS}.get(config.reviews, Path(config.reviews or ""))
    wrong = wrong_problems(read_reviews(reviews)) if reviews else set()
    ids = [problem.id for problem in problems if problem.id not in wrong]
    if not ids:
        raise ValueError(f"{reviews}: no problem of {config.path} is left: all were found wrong")
    return ids


def _open_learner(model: PreTrainedModel, config: Config) -> "Learner | Ranks":
    dtype, learner = resolve_dtype(config.model), config.learner
    if learner.importance != "none" and (config.rollout.top_p < 1.0 or config.rollout.top_k):
        log.warning("learner.importance is off: rollout.top_p and top_k cut what the engine sampled from")
        learner = learner.model_copy(update={"importance": "none"})
    if learner.num_ranks == 1:
        return Learner(model, learner, config.rollout.temperature, dtype)
    try:
        from cat_grpo.ranks import Ranks
    except ImportError as error:
        raise ValueError("learner.num_ranks needs Ray: pip install -e '.[ray]' in a checkout") from error
    return Ranks(model, model_folder(config.model.path), learner, config.rollout.temperature, dtype)
