"""The words that models read: one folder of plain-text Jinja templates per prompt set.

A set may have any templates. A run needs those that its estimator and its rewards fill in, and no others.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateSyntaxError

from cat_grpo.errors import BadInput
from cat_grpo.records import Message
from cat_grpo.shipped import shipped


def render(prompt_set: str, name: str, **fields: object) -> str:
    """Fills in the template `name` of a set. A field that it names and the call lacks is an error."""
    return _environment(prompt_set).get_template(f"{name}.txt").render(**fields)


def ask(text: str) -> list[Message]:
    """A conversation of one turn, the user's."""
    return [{"role": "user", "content": text}]


def template_hashes(prompt_set: str, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each template: prompts are part of the experiment, so a run's manifest names them."""
    folder = set_folder(prompt_set)
    return {name: hashlib.sha256((folder / f"{name}.txt").read_bytes()).hexdigest() for name in names}


def set_folder(prompt_set: str) -> Path:
    """The folder of a shipped set (`default`, `lab`) or of one's own. BadInput where there is none."""
    shipped_set = shipped("prompts", prompt_set)
    folder = shipped_set if shipped_set.is_dir() else Path(prompt_set)
    if not folder.is_dir():
        raise BadInput(f"prompts: {prompt_set!r}: there is no such set and no such folder")
    return folder


def refuse_missing(prompt_set: str, names: Iterable[str]) -> None:
    """BadInput for the first template that the set lacks, or that is not Jinja."""
    folder = set_folder(prompt_set)
    for name in names:
        file = folder / f"{name}.txt"
        if not file.is_file():
            raise BadInput(f"prompts: {prompt_set!r}: {folder} has no {file.name}")
        try:
            _environment(prompt_set).get_template(file.name)
        except TemplateSyntaxError as error:
            raise BadInput(f"{file}:{error.lineno}: {error.message}") from error


def fence(text: str, tag: str) -> str:
    """Makes untrusted text unable to open or close the tag that a template puts around it."""
    # A field that was not given is no str yet: str() has Jinja name it.
    return re.sub(rf"<(?=\s*/?\s*{re.escape(tag)}\b)", "&lt;", str(text), flags=re.IGNORECASE)


@cache
def _environment(prompt_set: str) -> Environment:
    # Plain text for a model, not HTML: escaping every < and & would change the mathematics that it reads.
    environment = Environment(
        loader=FileSystemLoader(set_folder(prompt_set)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        autoescape=False,
    )
    filters: Mapping = {"fence": fence}
    environment.filters.update(filters)
    return environment
