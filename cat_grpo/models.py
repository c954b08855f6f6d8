"""Model folders: where a model is, and the card in which a model of ours describes itself."""

import json
from pathlib import Path
from typing import Any

from cat_grpo.shipped import shipped

CARD = "cat_grpo.json"
"""Beside the weights: the settings that the model was trained to be asked with, its anchor, its step."""


def model_folder(path: str) -> str:
    """The folder or hub id of a model: `lab` stands for the one that ships with cat_grpo."""
    return str(shipped("data", "lab", "model")) if path == "lab" else path


def read_card(path: str) -> dict[str, Any]:
    """The card of a model of ours; empty for any other model."""
    card = Path(model_folder(path)) / CARD
    return json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
