"""Training as a flow run."""

from pathlib import Path

from prefect import flow

from cat_grpo.config import Config
from cat_grpo.run.train import train as train_run
from flows.gate import refuse_unseen
from flows.observing import Training
from flows.secrets import read_secrets


@flow(name="train", flow_run_name="{run_dir}")
async def train(config: Config, run_dir: str) -> str:
    """Train in a run directory, from its latest checkpoint on. Returns the folder of the best checkpoint.

    Args:
        config: The model, the data and how to train.
        run_dir: The run's folder. An existing run is resumed.
    """
    refuse_unseen(config.train)
    secrets = await read_secrets(config)
    async with Training() as observer:
        run = await train_run(config, Path(run_dir), observer, secrets)
        await observer.ended(run)
    return str(run.best_checkpoint)
