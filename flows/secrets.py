"""Reads the keys of servers from Prefect. A flow has them only while it runs and never writes them down."""

from prefect.blocks.system import Secret

from cat_grpo.config import Config
from cat_grpo.errors import BadInput


async def read_secrets(config: Config) -> dict[str, str]:
    """The key behind each `prefect:NAME` in the config. BadInput when there is no such block."""
    models = [model for model in (config.model, config.anchor, config.judge) if model]
    wanted = {model.server.api_key for model in models if model.server.api_key.startswith("prefect:")}
    return {where: await _read(where.removeprefix("prefect:")) for where in wanted}


async def _read(name: str) -> str:
    try:
        block = await Secret.aload(name)
    except ValueError as error:
        raise BadInput(f"server.api_key: prefect:{name}: there is no such Secret block") from error
    return str(block.get())
