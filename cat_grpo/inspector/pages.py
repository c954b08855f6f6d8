"""Fills in the templates, and writes figures, names and addresses for them."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cat_grpo.inspector.texts import cut, rendered, shown_name
from cat_grpo.report.pages import metric_words
from cat_grpo.report.reviews import Accuracy

FOLDER = Path(__file__).parent


def page(template: str, status: int = 200, **fields: Any) -> HTMLResponse:
    """The filled-in template. It escapes every text that no function of `texts` made."""
    return HTMLResponse(_ENVIRONMENT.get_template(template).render(**fields), status)


def run_url(name: str) -> str:
    """The address of the run's page. Its steps and groups follow, counted from 0: `/step/12/group/345`."""
    return f"/run/{quote(name)}"


def figure(value: Any, name: str = "") -> str:
    """The value in the unit that the metric's name tells; a dash when it is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "—"
    if name.endswith("_frac"):
        return f"{value:.1%}"
    if name.endswith("_s"):
        return f"{value:.1f} s"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def accuracy_text(found: Accuracy) -> str:
    """The accuracy, its standard error unless that is 0, and the number of reviews behind it."""
    if found.mean is None:
        return f"— ({found.unsure} unsure)" if found.unsure else "—"
    error = f" ± {found.standard_error:.1%}" if found.standard_error else ""
    told = f"{found.mean:.1%}{error} of {found.right + found.wrong}"
    return f"{told}, {found.unsure} unsure" if found.unsure else told


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _level(probability: float | None) -> int:
    """A level from 0 to 10, for a colour; 5 without a probability."""
    return 5 if probability is None else round(10 * min(max(probability, 0.0), 1.0))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Mapping[str, Any] = {
        "accuracy": accuracy_text,
        "cut": cut,
        "figure": figure,
        "level": _level,
        "quoted": lambda text: quote(text, safe=""),
        "rendered": rendered,
        "run_url": run_url,
        "shown": shown_name,
        "time": _time,
        "words": metric_words,
    }
    environment.filters.update(filters)
    return environment


_ENVIRONMENT = _environment()
