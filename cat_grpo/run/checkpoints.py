"""Checkpoints are saved whole or not at all, for `from_pretrained` and to resume a run bit for bit."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cat_grpo.errors import BadInput
from cat_grpo.files import whole, write_whole
from cat_grpo.learner import TrainsPolicy
from cat_grpo.learner.lora import load_merged
from cat_grpo.models import CARD


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`: numbered, with the links `latest` and `best`."""

    folder: Path

    def save(
        self, step: int, learner: TrainsPolicy, tokenizer: PreTrainedTokenizerBase, card: Mapping, best: bool
    ) -> Path:
        """Saves everything after `step` finished steps, and removes all older ones but the best.

        `latest` is linked last: a save that was cut short is made again from the one before.
        """
        final = self.folder / f"{step:06d}"
        with whole(final) as temporary:
            learner.save(temporary)
            tokenizer.save_pretrained(temporary)
            write_whole(temporary / CARD, json.dumps({**card, "step": step}, indent=2))
        for name in ("best", "latest") if best else ("latest",):
            self._link(name, final)
        self._prune()
        return final

    def latest_step(self) -> int:
        """Returns how many steps are behind `latest`; 0 when there is none."""
        latest = self.folder / "latest"
        return int(latest.resolve().name) if latest.exists() else 0

    def restore(self, learner: TrainsPolicy) -> None:
        """Gives the learner the weights and the optimizer of `latest`."""
        learner.restore(self.folder / "latest")

    def _link(self, name: str, target: Path) -> None:
        with whole(self.folder / name) as temporary:
            temporary.symlink_to(target.name)

    def _prune(self) -> None:
        kept = {(self.folder / name).resolve() for name in ("latest", "best")}
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.resolve() not in kept:
                shutil.rmtree(path)


def export_model(checkpoint: Path, out: Path, dtype: Literal["float32", "bfloat16"]) -> Path:
    """Writes the checkpoint as a plain model folder. BadInput when it is missing or `out` exists."""
    if not checkpoint.exists():
        raise BadInput(f"{checkpoint}: no such checkpoint")
    if out.exists():
        raise BadInput(f"{out}: is there already")
    with whole(out) as temporary:
        load_merged(checkpoint, dtype).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(temporary)
    return out
