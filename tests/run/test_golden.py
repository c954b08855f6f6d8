"""Three steps of the lab against recorded figures: a change of a number that nobody meant is seen.

Record anew, after a change that is meant to change them or with another lab model:

    OMP_NUM_THREADS=1 python tests/run/test_golden.py
"""

import asyncio
import json
import tempfile
from pathlib import Path

import pytest
import torch

from cat_grpo.lab.problems import labelled_rows, unlabelled, write_problems
from cat_grpo.run.train import train
from cat_grpo.settings import load_config
from cat_grpo.shipped import shipped

GOLDEN = Path(__file__).with_name("golden.json")
FIGURES = ("reward/mean", "policy/loss", "policy/grad_norm", "policy/entropy")


async def trajectory(lab_model: Path, folder: Path) -> dict:
    """Both families through every stage: two updates a step, so that the loss is not the 0 of on-policy."""
    rows = [row for kind in ("verifiable", "open") for row in labelled_rows(kind, 6, 0, held_out=False)]
    write_problems(unlabelled(rows), folder / "train.jsonl")
    overrides = [
        f"model.path={lab_model}",
        "model.device=cpu",
        f"data.path={folder / 'train.jsonl'}",
        "rollout.group_size=4",
        "rollout.max_tokens=64",
        "reference.max_tokens=64",
        "reward.min_criteria=2",
        "reward.rubric_max_tokens=96",
        "learner.kl_coef=0.01",
        "learner.updates_per_step=2",
        "train.steps=3",
        "train.problems_per_step=4",
        "train.shard_size=2",
    ]
    run = await train(load_config("lab-verifiable", overrides=overrides), folder / "run")
    first = run.read_groups(0, 0)[0].rollouts[0]
    return {
        "first_rollout": list(first.token_ids),
        "steps": [{name: float(f"{metrics[name]:.6g}") for name in FIGURES} for metrics in run.metrics()],
    }


async def test_three_steps_are_those_on_record(lab_model: Path, tmp_path: Path):
    golden = json.loads(GOLDEN.read_text())
    found = await trajectory(lab_model, tmp_path)
    assert found["first_rollout"] == golden["first_rollout"]
    for figures, expected in zip(found["steps"], golden["steps"], strict=True):
        # Another CPU adds in another order, and AdamW makes more of it: without vector instructions at all
        # (ATEN_CPU_CAPABILITY=default) the figures moved by 2e-5.
        assert figures == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_record_would_show_a_change():
    """A figure that is 0, or the same in every step, would pass for almost any code."""
    for name in FIGURES:
        values = [figures[name] for figures in json.loads(GOLDEN.read_text())["steps"]]
        assert len(set(values)) > 1
        assert min(map(abs, values)) > 1e-4


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record = asyncio.run(trajectory(shipped("data", "lab", "model"), Path(folder)))
    GOLDEN.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
