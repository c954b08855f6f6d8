"""Opens a training run: checks what it reads, loads its models, and begins or resumes it."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cat_grpo.config import Config, DataConfig
from cat_grpo.data import load_problems
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer, resolve_dtype
from cat_grpo.engines.roles import open_roles, refuse_untrainable
from cat_grpo.engines.sync import Probe, make_probes
from cat_grpo.errors import BadInput
from cat_grpo.evaluation import load_labelled
from cat_grpo.learner import TrainsPolicy
from cat_grpo.learner.learner import Learner
from cat_grpo.learner.lora import add_adapters, has_adapters
from cat_grpo.method import cat
from cat_grpo.method.rollouts import solve_prompt
from cat_grpo.models import model_folder
from cat_grpo.records import Problem, kinds_of
from cat_grpo.report.reviews import REVIEWS, read_reviews, wrong_problems
from cat_grpo.report.trackers import open_tracker
from cat_grpo.run.checkpoints import Checkpoints
from cat_grpo.run.order import ProblemOrder
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.step import Loop

log = logging.getLogger(__name__)

NUM_PROBES = 8


@asynccontextmanager
async def open_loop(
    config: Config, run_path: Path, secrets: Mapping[str, str] | None = None
) -> AsyncIterator[Loop]:
    """Opens a new run, or the existing one in `run_path` at its latest checkpoint; closes all at the end.

    `secrets` are the keys that the config names by `prefect:NAME`. BadInput for what cannot be used.
    """
    refuse_untrainable(config)
    problems = load_problems(config.data)
    kinds = kinds_of(problems)
    cat.refuse_unusable(config, kinds)
    validation = (
        load_labelled(Path(config.train.validation), config.train.validation_limit)
        if config.train.validation
        else []
    )
    model, tokenizer = _policy(config)
    run = RunDir.open(run_path, config, problems)
    changes = run.take_in(_trained_on(problems, config.data, run.path))
    checkpoints = Checkpoints(run.checkpoints)
    live = HFEngine(model, tokenizer, config.model)
    # Each closes, whatever another raises.
    async with AsyncExitStack() as opened:
        opened.push_async_callback(live.close)
        learner = _open_learner(model, config)
        opened.callback(learner.close)
        next_step = checkpoints.latest_step()
        if next_step:
            checkpoints.restore(learner)
        settings = config.model_dump(mode="json")
        tracker = open_tracker(config.train.tracker, run.path, settings, next_step)
        opened.callback(tracker.close)
        engines = await open_roles(config, live, secrets or {})
        opened.push_async_callback(engines.close)
        await cat.refuse_unfit(engines, config, kinds)
        loop = Loop(
            config=config,
            run=run,
            problems={problem.id: problem for problem in problems},
            order=ProblemOrder(changes, config.train.problems_per_step, config.train.seed),
            validation=validation,
            engines=engines,
            learner=learner,
            live=live,
            tokenizer=tokenizer,
            checkpoints=checkpoints,
            probes=_probes(problems, live, config.prompts),
            tracker=tracker,
            history=run.cut_metrics(next_step),
        )
        await loop.sync()
        yield loop


def _policy(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that is trained: its weights in float32, or in the compute type beside adapters."""
    lora_rank = config.learner.lora_rank
    model, tokenizer = load_model_and_tokenizer(config.model, None if lora_rank else torch.float32)
    if has_adapters(model):
        raise BadInput(f"model {config.model.path!r}: has only adapters: cat-grpo export merges them")
    if lora_rank:
        add_adapters(model, lora_rank, config.learner.lora_alpha, config.train.seed)
    return model, tokenizer


def _probes(problems: Sequence[Problem], live: HFEngine, prompt_set: str) -> list[Probe]:
    return make_probes(
        [
            (f"the prompt of problem {problem.id}", live.tokens.encode(solve_prompt(problem, prompt_set)))
            for problem in problems[:NUM_PROBES]
        ]
    )


def _trained_on(problems: Sequence[Problem], config: DataConfig, run_path: Path) -> list[str]:
    """Returns the ids without those whose reference was marked wrong. BadInput when none is left."""
    reviews = {None: None, "own": run_path / REVIEWS}.get(config.reviews, Path(config.reviews or ""))
    wrong = wrong_problems(read_reviews(reviews)) if reviews else set()
    ids = [problem.id for problem in problems if problem.id not in wrong]
    if not ids:
        raise BadInput(f"{reviews}: no problem of {config.path} is left: all were found wrong")
    return ids


def _open_learner(model: PreTrainedModel, config: Config) -> TrainsPolicy:
    dtype, learner = resolve_dtype(config.model), config.learner
    if learner.importance != "none" and (config.rollout.top_p < 1.0 or config.rollout.top_k):
        log.warning("learner.importance is off: rollout.top_p and top_k cut what the engine sampled from")
        learner = learner.model_copy(update={"importance": "none"})
    if learner.num_ranks == 1:
        return Learner(model, learner, config.rollout.temperature, dtype)
    try:
        from cat_grpo.learner.sharded import Ranks
    except ImportError as error:
        raise BadInput("learner.num_ranks needs Ray: pip install -e '.[ray]' in a checkout") from error
    return Ranks(model, model_folder(config.model.path), learner, config.rollout.temperature, dtype)
