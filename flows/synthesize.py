"""Compute as Teacher without training, as a flow run: a task run per step's worth of problems."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import acreate_table_artifact

from cat_grpo.config import Config
from cat_grpo.report.pages import table_rows
from cat_grpo.run.synthesize import synthesize as synthesize_file
from flows.artifacts import artifact_key, publish
from flows.observing import TaskRuns
from flows.secrets import read_secrets


@flow(name="synthesize", flow_run_name="{out}")
async def synthesize(config: Config, out: str) -> str:
    """Writes one row per problem of the config's data to `out`, and returns `out`.

    Args:
        config: The problems and how to answer them.
        out: A .jsonl or .parquet file.
    """
    secrets = await read_secrets(config)
    async with TaskRuns() as observer:
        rows = await synthesize_file(config, Path(out), observer, secrets)
    shown = table_rows([{name: row[name] for name in row if name not in ("id", "rollouts")} for row in rows])
    about = f"{len(shown)} of {len(rows)} rows. In full: {out}"
    key = f"{artifact_key(Path(out).name)}-references"
    await publish(acreate_table_artifact(shown, key, about))
    return out
