"""The demo: both families of the lab, trained without labels, measured on held-out answers."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow

from cat_grpo.files import write_whole
from cat_grpo.settings import load_config
from cat_grpo.shipped import shipped
from flows.evaluate import evaluate
from flows.train import train

NUM_HELD_OUT = {"verifiable": 200, "open": 100}


def make_room(out: Path, seed: int) -> None:
    """Moves a demo of another seed aside to OUT-SEED. Moves the demo of this seed back if it was moved."""
    config = out / "verifiable" / "config.json"
    if not config.exists():
        return
    there = json.loads(config.read_text())["train"]["seed"]
    if there != seed:
        os.replace(out, out.with_name(f"{out.name}-{there}"))
        with suppress(FileNotFoundError):
            os.replace(out.with_name(f"{out.name}-{seed}"), out)


@flow(name="demo", flow_run_name="demo-seed-{seed}")
async def demo(seed: int = 0, out: str = "runs/demo") -> dict[str, Any]:
    """Trains into `out`/verifiable and `out`/open and writes `out`/summary.json, which it returns.

    Only the table uses the held-out answers. Checkpoints are chosen without labels.
    """
    make_room(Path(out), seed)
    summary: dict[str, Any] = {"seed": seed}
    for kind, num_held_out in NUM_HELD_OUT.items():
        config = load_config(f"lab-{kind}", overrides=[f"train.seed={seed}"])
        held_out = str(shipped("data", "lab", kind, "heldout.jsonl"))
        before = await evaluate(config, held_out, model="lab", limit=num_held_out, seed=seed)
        started = time.monotonic()
        best = await train(config, str(Path(out) / kind))
        seconds = time.monotonic() - started
        after = await evaluate(config, held_out, model=best, limit=num_held_out, seed=seed)
        summary[kind] = {"before": before, "after": after, "seconds": round(seconds, 1)}
    write_whole(Path(out) / "summary.json", json.dumps(summary, indent=2))
    return summary
