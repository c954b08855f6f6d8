"""Estimators and rewards are plain functions known by name: those that ship, and a user's by import path.

The decorator `needs` says what such a function needs of a run.
"""

import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from cat_grpo.config import Config
from cat_grpo.errors import BadInput
from cat_grpo.records import Kind

F = TypeVar("F", bound=Callable[..., Any])


def needs(*templates: str, kinds: Collection[Kind] = get_args(Kind)) -> Callable[[F], F]:
    """Says which templates a function fills in, and which kinds of problems it is for.

    In a template's name {kind} stands for the problem's kind, {verdict} for `reward.verdict`.
    """

    def mark(function: F) -> F:
        function.templates, function.kinds = templates, kinds  # type: ignore[attr-defined]
        return function

    return mark


def find(name: str, shipped: Mapping[str, F], setting: str) -> F:
    """Returns the function that a setting names: one that ships, or `module:function`.

    A module is looked for on the import path and then in the current folder. BadInput names the setting.
    """
    if name in shipped:
        return shipped[name]
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        known = ", ".join(shipped)
        raise BadInput(f"{setting}: {name!r}: expected one of {known}, or module:function of your own")
    module, _, attribute = name.partition(":")
    try:
        function: F = getattr(_imported(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module of the user's that lacks another
        raise BadInput(f"{setting}: {name!r}: there is no module {error.name!r}") from error
    except AttributeError as error:
        raise BadInput(f"{setting}: {name!r}: {error}") from error
    if not callable(function):
        raise BadInput(f"{setting}: {name!r}: is no function")
    return function


def templates_of(function: Callable[..., Any], config: Config, kind: Kind) -> list[str]:
    """The templates that the function fills in for problems of a kind; none where it does not say."""
    named: Iterable[str] = getattr(function, "templates", ())
    return [name.format(kind=kind, verdict=config.reward.verdict) for name in named]


def refuse_kind(function: Callable[..., Any], kind: Kind, setting: str) -> None:
    """BadInput where the function is not for problems of this kind."""
    kinds = getattr(function, "kinds", get_args(Kind))
    if kind not in kinds:
        raise BadInput(f"{setting}: is for {' and '.join(kinds)} problems, and the data has {kind} ones")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        if str(Path.cwd()) in sys.path:
            raise
        sys.path.append(str(Path.cwd()))  # an installed command's import path has no current folder
        return importlib.import_module(module)
