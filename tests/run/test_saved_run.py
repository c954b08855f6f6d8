"""A run that an earlier release made is resumed by this one, though settings and templates have been added.

`tests/run/saved` is such a run, of adapters so small that they can be kept: two of its four steps, and what
the adapters were after all four. Make it anew, only if runs from before are no longer to be resumed:

    OMP_NUM_THREADS=1 python tests/run/test_saved_run.py
"""

import asyncio
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cat_grpo import settings
from cat_grpo.config import Config, RolloutConfig
from cat_grpo.learner.lora import ADAPTER_WEIGHTS
from cat_grpo.method.references import ESTIMATORS
from cat_grpo.run.train import train
from cat_grpo.settings import load_config

SAVED = Path(__file__).with_name("saved")
SETTINGS = (
    "model.device=cpu",
    "rollout.group_size=4",
    "train.problems_per_step=2",
    "train.checkpoint_every=2",
    "learner.lora_rank=1",
    "learner.learning_rate=1e-2",
    "learner.kl_coef=0.01",
)


class GrownRollouts(RolloutConfig):
    min_tokens: int = 0


class GrownConfig(Config):
    """What a later release may have."""

    rollout: GrownRollouts = GrownRollouts()


async def resumed(folder: Path) -> bytes:
    """A copy of the saved run at its end: the bytes of its adapters."""
    shutil.copytree(SAVED / "run", folder, symlinks=True)
    before = {path: path.read_bytes() for path in folder.glob("steps/*/*")}
    run = await train(load_config("lab-verifiable", overrides=[*SETTINGS, "train.steps=4"]), folder)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3]
    assert {path: path.read_bytes() for path in before} == before
    return (run.checkpoints / "latest" / ADAPTER_WEIGHTS).read_bytes()


@pytest.fixture
async def plain(tmp_path: Path) -> bytes:
    return await resumed(tmp_path / "plain")


async def test_it_ends_where_it_would_have(tmp_path: Path, plain: bytes):
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(plain)
    ours, theirs = load_file(tmp_path / ADAPTER_WEIGHTS), load_file(SAVED / "end.safetensors")
    start = load_file(SAVED / "run" / "checkpoints" / "latest" / ADAPTER_WEIGHTS)
    assert ours.keys() == theirs.keys()
    # Another CPU adds in another order, and AdamW makes more of it.
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in ours)
    assert not all(torch.allclose(ours[name], start[name], rtol=1e-3, atol=1e-4) for name in ours)


async def test_a_setting_more_and_a_template_more_change_nothing(
    tmp_path: Path, plain: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings, "Config", GrownConfig)
    monkeypatch.setattr(ESTIMATORS["synthesis"], "templates", ("synthesize_{kind}", "propose_rubric"))
    assert await resumed(tmp_path / "grown") == plain
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    manifest = json.loads((tmp_path / "grown" / "manifest.json").read_text())
    assert config["rollout"]["min_tokens"] == 0
    assert sorted(manifest["prompt_hashes"]) == [
        "propose_rubric",
        "solve_verifiable",
        "synthesize_verifiable",
    ]


def make(folder: Path) -> None:
    """The saved run, without a path of the machine that it was made on."""
    for steps in (2, 4):
        config = load_config("lab-verifiable", overrides=[*SETTINGS, f"train.steps={steps}"])
        run = asyncio.run(train(config, folder / "run"))
        if steps == 2:
            shutil.rmtree(SAVED, ignore_errors=True)
            shutil.copytree(folder / "run", SAVED / "run", symlinks=True)
    shutil.copy(run.checkpoints / "latest" / ADAPTER_WEIGHTS, SAVED / "end.safetensors")
    shutil.rmtree(SAVED / "run" / "weights", ignore_errors=True)
    for card in SAVED.glob("run/checkpoints/0*/adapter_config.json"):
        told = json.loads(card.read_text())
        card.write_text(json.dumps({**told, "base_model_name_or_path": "data/lab/model"}, indent=2) + "\n")
        (card.parent / "README.md").unlink(missing_ok=True)  # peft's, with the same path


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
