"""How a config comes together, and how two are compared.

Defaults, then a preset (a sparse TOML file of the folder `presets` with what one model or data set wants),
the user's file, the user's overrides.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cat_grpo.config import Config, MayChange, Section
from cat_grpo.errors import BadInput

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Returns the presets that ship with cat_grpo."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Merges the defaults, `base`, the preset, a TOML file and overrides `section.key=value`, in this order.

    BadInput names the source and the key in one line.
    """
    tree: dict[str, Any] = {}
    _merge(tree, base or {})
    if preset is not None:
        if preset not in preset_names():
            raise BadInput(f"unknown preset {preset!r}: the presets are {', '.join(preset_names())}")
        _merge(tree, _read_toml(_PRESETS / f"{preset}.toml"))
    if file is not None:
        _merge(tree, _read_toml(file))
    for override in overrides:
        _merge(tree, _parse_override(override))
    with _named("config"):
        return Config.model_validate(tree)


def read_config(path: Path) -> Config:
    """Reads a config that was saved as JSON. A missing key has its default. BadInput names file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    with _named(str(path)):
        return Config.model_validate_json(text)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, ours, theirs) of each setting that differs; None stands for a missing one."""
    flat = [dict(_flat(tree)) for tree in (ours, theirs)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = [(key, flat[0].get(key), flat[1].get(key)) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def may_change(key: str) -> bool:
    """Whether a resumed run may set `section.key` anew: its field, or one above it, is marked MayChange."""
    return any(MayChange in field.metadata for field in _fields(key))


def _fields(key: str, section: type[BaseModel] = Config) -> Iterator[FieldInfo]:
    """Yields the fields on the way to `section.key`. Below a dict there are none."""
    name, _, below = key.partition(".")
    if field := section.model_fields.get(name):
        yield field
        for kind in (field.annotation, *get_args(field.annotation)):
            if below and isinstance(kind, type) and issubclass(kind, Section):
                yield from _fields(below, kind)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turns pydantic's first complaint into a line of BadInput that begins with `where`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise BadInput(": ".join(filter(None, (where, key, first["msg"])))) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise BadInput(f"{path}: {error}") from error


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override {override!r}: expected section.key=value")
    value: Any
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = (
            None if text.lower() in ("none", "null") and _may_be_none(key) else text
        )  # else a bare word is text
    *sections, name = key.split(".")
    tree: dict[str, Any] = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _may_be_none(key: str) -> bool:
    *_, field = None, *_fields(key)
    return field is not None and NoneType in get_args(field.annotation)


def _merge(tree: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            _merge(tree[key], value)
        else:
            tree[key] = value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
