"""Presets, and how a config comes together: defaults, a preset, the user's file, the user's overrides.

A preset is a sparse TOML file in this folder with what one model or data set wants.
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cat_grpo.config import Config

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """The presets that ship with cat_grpo."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Defaults, then `base`, the preset, the user's TOML file, and `section.key=value` overrides.

    Raises ValueError with the source and the key in one line.
    """
    tree: dict[str, Any] = {}
    _merge(tree, base or {})
    if preset is not None:
        if preset not in preset_names():
            raise ValueError(f"unknown preset {preset!r}: the presets are {', '.join(preset_names())}")
        _merge(tree, _read_toml(_FOLDER / f"{preset}.toml"))
    if file is not None:
        _merge(tree, _read_toml(file))
    for override in overrides:
        _merge(tree, _parse_override(override))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.key=value")
    value: Any
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.lower() in ("none", "null") else text  # a bare word is a string
    *sections, name = key.split(".")
    tree: dict[str, Any] = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _merge(tree: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            _merge(tree[key], value)
        else:
            tree[key] = value
