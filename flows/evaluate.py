"""Measures a checkpoint in a flow run. The figures are its result and its page."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact

from cat_grpo.config import Config
from cat_grpo.evaluation import evaluate as evaluate_model
from cat_grpo.report.pages import figures_table
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
    """The figures of a model on a labelled file, each with its standard error.

    Args:
        config: How to ask the model and make its references.
        problems: A labelled file: id, prompt, kind, answer or points; or lab:verifiable, lab:open.
        model: A checkpoint, a hub id, or lab. None means the config's model.
        anchor: None means the anchor that our checkpoint was trained with, or else the model itself.
        limit: At most this many problems.
        seed: The seed of the rollouts.
    """
    model = model or config.model.path
    secrets = await read_secrets(config)
    figures = await evaluate_model(config, Path(problems), model, anchor, limit, seed, secrets)
    page = f"# {model}\n\n{figures['num_problems']:.0f} problems of {problems}\n\n{figures_table(figures)}\n"
    await publish(acreate_markdown_artifact(page, f"{artifact_key(model)}-evaluation", problems))
    return figures
