"""A run's curves as SVG, drawn on the server: small multiples with the values behind them for hovering."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cat_grpo.metrics import Metrics, mean
from cat_grpo.plots import PANELS as REPORTED
from cat_grpo.selection import WINDOW

Curve = Mapping[int, float]
"""The value at each step, counted from 1."""

PANELS = {
    "Reward": REPORTED["Reward"],
    "Spread inside a group": {"reward std": "reward/std"},
    "Groups without signal": {
        "all rewards equal": "reward/no_variance_frac",
        "no reward": "reward/dropped_frac",
    },
    "Held out and checkpoints": REPORTED["Checkpoints"],
    **{title: names for title, names in REPORTED.items() if title not in ("Reward", "Checkpoints")},
}
"""By title: what each curve is called, and its metric."""
WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 22
MOST_POINTS = 250
"""Of one curve: finer than the pixels is only bytes."""
MOST_DOTS = 60
"""A longer curve has no dots."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture and what its lines are."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    """(class of the line, label)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Where steps and values stand in the picture."""

    first: int
    last: int
    ticks: tuple[float, ...]
    """Of the values, from the bottom of the picture to its top."""

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / max(self.last - self.first, 1)

    def y(self, value: float) -> float:
        span = self.ticks[-1] - self.ticks[0]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.ticks[0]) / span


def panels(runs: Mapping[str, Sequence[Metrics]]) -> list[Panel]:
    """Of one run, or of several in the same pictures; a panel with nothing to show is left out.

    A colour is a run, or in the pictures of one run a curve; beside another run a further curve is dashed.
    """
    drawn = []
    for title, names in PANELS.items():
        curves: dict[tuple[str, str], Curve] = {}
        for i, (run, history) in enumerate(runs.items()):
            for label, curve in _curves(history, names).items():
                k = [*names].index(label)
                look = f"c{k}" if len(runs) == 1 else f"c{i} d{k}"
                curves[look, label if len(runs) == 1 else f"{run}: {label}"] = curve
        if curves:
            drawn.append(Panel(title, _svg(title, curves), tuple(curves)))
    return drawn


def _curves(history: Sequence[Metrics], names: Mapping[str, str]) -> dict[str, Curve]:
    """By label. A curve that repeats another, or has no finite value, is left out."""
    curves: dict[str, Curve] = {}
    for label, name in names.items():
        numbered = ((step, metrics.get(name, math.nan)) for step, metrics in enumerate(history, start=1))
        curve = {step: value for step, value in numbered if math.isfinite(value)}
        if curve and curve not in curves.values():
            curves[label] = curve
    return curves


def _svg(title: str, curves: Mapping[tuple[str, str], Curve]) -> Markup:
    scale = _scale(list(curves.values()))
    parts = [_axes(scale)]
    for (look, label), curve in curves.items():
        parts += _lines(look, label, curve, scale)
    known = [
        {"label": label, "points": [[step, value, scale.x(step), scale.y(value)] for step, value in shown]}
        for (_, label), curve in curves.items()
        if (shown := _thinned(curve))
    ]
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-curves="{}">{}'
        '<line class="cursor" x1="0" x2="0" y1="{}" y2="{}"/></svg>'
    ).format(WIDTH, HEIGHT, title, json.dumps(known), Markup("").join(parts), TOP, HEIGHT - BOTTOM)


def _lines(look: str, label: str, curve: Curve, scale: Scale) -> list[Markup]:
    """Few steps as dots on a line; many faint, under their running mean."""
    points = _thinned(curve)
    if len(curve) <= MOST_DOTS:
        dots = [_dot(look, scale.x(step), scale.y(v), f"{label}, step {step}: {v:.4g}") for step, v in points]
        return [_line(look, points, scale), *dots]
    values = list(curve.values())
    recent = {step: mean(values[max(0, i - WINDOW) : i]) for i, step in enumerate(curve, start=1)}
    return [_line(f"{look} faint", points, scale), _line(look, _thinned(recent), scale)]


def _dot(look: str, x: float, y: float, told: str) -> Markup:
    dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.4"><title>{}</title></circle>')
    return dot.format(look, x, y, told)


def _line(look: str, points: Sequence[tuple[int, float]], scale: Scale) -> Markup:
    path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in points)
    return Markup('<polyline class="{}" points="{}"/>').format(look, path)


def _thinned(curve: Curve) -> list[tuple[int, float]]:
    """The last step is always among them."""
    points = list(curve.items())
    stride = -(-len(points) // MOST_POINTS)
    return points[::-1][::stride][::-1]


def _axes(scale: Scale) -> Markup:
    parts = []
    for value in scale.ticks:
        y = scale.y(value)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 3.5, f"{value:.6g}")
        )
    for step in sorted({scale.first, (scale.first + scale.last) // 2, scale.last}):
        anchor = "end" if step == scale.last != scale.first else "middle"
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
                scale.x(step), HEIGHT - 6, anchor, step
            )
        )
    return Markup("").join(parts)


def _scale(curves: Sequence[Curve]) -> Scale:
    """From zero where nothing is below: a zoomed axis makes noise look like a trend."""
    steps = [step for curve in curves for step in curve]
    values = [value for curve in curves for value in curve.values()]
    return Scale(min(steps), max(steps), _ticks(min(0.0, *values), max(0.0, *values)))


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Two to six round values, the first not above `low` and the last not below `high`."""
    span = high - low or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    size = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 4)
    first, last = math.floor(low / size + 1e-9), max(math.ceil(high / size - 1e-9), 1)
    return tuple(size * number for number in range(first, last + 1))
