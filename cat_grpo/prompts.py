"""The words that models read: one folder of plain-text Jinja templates per set, the same files in each."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cat_grpo.shipped import shipped

TEMPLATES = (
    "solve_verifiable",
    "solve_open",
    "synthesize_verifiable",
    "synthesize_open",
    "propose_rubric",
    "judge_label",
    "judge_xml",
)


def render(prompt_set: str, name: str, **fields: object) -> str:
    """The template `name` of a set, filled in. A field that it names and the call lacks is an error."""
    return _environment(prompt_set).get_template(f"{name}.txt").render(**fields)


def prompt_hashes(prompt_set: str) -> dict[str, str]:
    """The sha256 of each template: prompts are part of the experiment, so a run's manifest names them."""
    folder = set_folder(prompt_set)
    return {name: hashlib.sha256((folder / f"{name}.txt").read_bytes()).hexdigest() for name in TEMPLATES}


def set_folder(prompt_set: str) -> Path:
    """A shipped set by name (`default`, `lab`) or a folder of one's own. ValueError names what is missing."""
    shipped_set = shipped("prompts", prompt_set)
    folder = shipped_set if shipped_set.is_dir() else Path(prompt_set)
    missing = [name for name in TEMPLATES if not (folder / f"{name}.txt").is_file()]
    if missing:
        raise ValueError(f"prompt set {prompt_set!r}: {folder} has no {missing[0]}.txt")
    return folder


def fence(text: str, tag: str) -> str:
    """Untrusted text made unable to open or close the tag that a template puts around it."""
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
