"""How good a checkpoint is, as a flow run: the figures are its result and its page."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact

from cat_grpo.checkpoints import read_card
from cat_grpo.config import Config, ModelConfig
from cat_grpo.engines import Engines
from cat_grpo.engines.roles import open_engines
from cat_grpo.engines.tokens import model_folder
from cat_grpo.evaluate import evaluate as measure
from cat_grpo.evaluate import load_labelled
from cat_grpo.report import figures_table
from flows.artifacts import artifact_key, publish
from flows.secrets import read_secrets


@flow(name="evaluate", flow_run_name="{model} on {problems}")
async def evaluate(
    config: Config,
    problems: str,
    model: str | None = None,
    anchor: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Figures of a model on a labelled file, each with its standard error.

    Args:
        config: How the model is asked and its references are made.
        problems: A labelled file: id, prompt, kind, answer or points; or lab:verifiable, lab:open.
        model: A checkpoint, a hub id, or lab; None is the config's model.
        anchor: None is what a checkpoint of ours was trained with, else the model itself.
        limit: At most this many problems.
        seed: Of the rollouts.
    """
    labelled = load_labelled(Path(problems), limit)
    model = model or config.model.path
    anchor = anchor or read_card(Path(model_folder(model))).get("anchor", model)
    secrets = await read_secrets(config)
    policy, frozen = at_path(config.model, model), at_path(config.anchor or config.model, anchor)
    engines = Engines(*await open_engines([policy, frozen, config.judge or frozen], secrets))
    try:
        figures = await measure(labelled, engines, config, seed)
    finally:
        await engines.close()
    page = f"# {model}\n\n{len(labelled)} problems of {problems}\n\n{figures_table(figures)}\n"
    await publish(acreate_markdown_artifact(page, f"{artifact_key(model)}-evaluation", problems))
    return figures


def at_path(config: ModelConfig, path: str) -> ModelConfig:
    """The same engine for the model at `path`. ValueError where its servers have another's name."""
    if config.engine == "openai" and config.server.model and path != config.path:
        raise ValueError(f"server.model: {config.server.model} cannot stand for {path}, too: leave it empty")
    return config.model_copy(update={"path": path})
