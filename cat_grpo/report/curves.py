"""Draws a run's curves as SVG: panel by panel with their values for pages, or all panels in one picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from cat_grpo.metrics import SCORE, WINDOW, Metrics, mean

T = TypeVar("T")

Curve = Mapping[int, float]
"""The value at each step, counted from 1."""

PANELS = {
    "Reward": {"reward": "reward/mean", "after penalties and KL": "reward/total_mean"},
    "Spread inside a group": {"reward std": "reward/std"},
    "Groups without signal": {
        "all rewards equal": "reward/no_variance_frac",
        "no reward": "reward/dropped_frac",
    },
    "Checkpoints": {
        "pass@1": "validation/pass@1",
        "points F1": "validation/points_f1",
        "reference accuracy": "validation/reference_accuracy",
        "score to choose by": SCORE,
    },
    "Majority's share": {"majority": "consensus/majority_frac"},
    "Reference differs": {
        "from the majority": "reference/differs_from_majority_frac",
        "from every rollout": "reference/differs_from_all_frac",
    },
    "Rubric": {"criteria met": "rubric/satisfied_frac", "judge abstained": "rubric/abstained_frac"},
    "Entropy, nats per token": {"entropy": "policy/entropy"},
    "KL to the anchor, nats": {"KL": "policy/kl"},
    "Length, tokens": {"rollout": "policy/tokens_per_rollout", "reference": "reference/tokens"},
}
"""The label of each curve and its metric, by the panel's title."""
WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 22
MOST_POINTS = 250
"""Points of one curve. More would be finer than the pixels and only cost bytes."""
MOST_DOTS = 60
"""A longer curve has no dots."""
MAX_PICTURE_BYTES = 36_000
"""Small, because a dashboard may send all versions of a run's pictures to the browser at once."""
NUM_COLUMNS, TITLE_HEIGHT, GAP = 3, 22, 18
COLOURS = ("#3f51c5", "#d2540a", "#11845b", "#9333a8")
STYLE = (
    "text { font: 10px system-ui, sans-serif; fill: #626773 }"
    " .title { font-size: 12px; font-weight: 600; fill: #1c1e24 } .title tspan { font: 10px system-ui }"
    " .grid { stroke: #e4e4e1 } polyline, path { fill: none; stroke-width: 1.6; stroke-linecap: round }"
    " .faint { opacity: .28; stroke-width: 1 } .dots { stroke-width: 4.8 }"
    + "".join(
        f" .c{i} {{ stroke: {colour} }} tspan.c{i} {{ stroke: none; fill: {colour} }}"
        for i, colour in enumerate(COLOURS)
    )
)
"""The style of the one picture. Pages use the style sheet, which also has colours for dark screens."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of some curves."""

    title: str
    curves: Mapping[tuple[str, str], Curve]
    """The curves by (class of the line, label)."""
    scale: "Scale"

    @property
    def svg(self) -> Markup:
        """The picture together with its data: the step, value and position of each point."""
        known = [
            {
                "label": label,
                "points": [
                    [step, value, self.scale.x(step), self.scale.y(value)]
                    for step, value in _thinned([*curve.items()], MOST_POINTS)
                ],
            }
            for (_, label), curve in self.curves.items()
        ]
        return Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-curves="{}">{}'
            '<line class="cursor" x1="0" x2="0" y1="{}" y2="{}"/></svg>'
        ).format(WIDTH, HEIGHT, self.title, json.dumps(known), self.drawing(), TOP, HEIGHT - BOTTOM)

    def drawing(self, most_points: int = MOST_POINTS) -> Markup:
        """The axes and the lines inside the picture."""
        lines = [_lines(look, curve, self.scale, most_points) for (look, _), curve in self.curves.items()]
        return Markup("").join([_axes(self.scale), *lines])


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps steps and values to places in the picture."""

    first: int
    last: int
    ticks: tuple[float, ...]
    """Values, from the bottom of the picture to its top."""

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / max(self.last - self.first, 1)

    def y(self, value: float) -> float:
        span = self.ticks[-1] - self.ticks[0]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.ticks[0]) / span


def panels(runs: Mapping[str, Sequence[Metrics]]) -> list[Panel]:
    """The panels of one run, or of several in the same pictures. Leaves out a panel with nothing to show.

    One run has a colour per curve. Several have a colour per run, and dashes tell each run's curves apart.
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
            drawn.append(Panel(title, curves, _scale(list(curves.values()))))
    return drawn


def picture(history: Sequence[Metrics]) -> str:
    """The run so far, all its panels in one SVG, with as many points as fit into MAX_PICTURE_BYTES."""
    drawn = panels({"run": history})
    for most_points in (MOST_POINTS, 160, 100, 60, 40):
        image = _picture(drawn, most_points)
        if len(image) <= MAX_PICTURE_BYTES:
            break
    return image


def _picture(drawn: Sequence[Panel], most_points: int) -> str:
    num_rows = max(1, -(-len(drawn) // NUM_COLUMNS))
    across, down = WIDTH + GAP, TITLE_HEIGHT + HEIGHT + GAP
    width, height = NUM_COLUMNS * across + GAP, num_rows * down + GAP
    cells = [
        Markup('<g transform="translate({} {})"><text class="title" y="12">{}{}</text>{}</g>').format(
            GAP + i % NUM_COLUMNS * across,
            GAP + i // NUM_COLUMNS * down,
            panel.title,
            _legend(panel),
            Markup('<g transform="translate(0 {})">{}</g>').format(TITLE_HEIGHT, panel.drawing(most_points)),
        )
        for i, panel in enumerate(drawn)
    ]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}">'
        '<style>{2}</style><rect width="{0}" height="{1}" fill="#fff"/>{3}</svg>'
    ).format(width, height, Markup(STYLE), Markup("").join(cells))


def _legend(panel: Panel) -> Markup:
    """The labels that follow the title, each in its curve's colour; empty when a panel can have only one."""
    if len(PANELS[panel.title]) == 1:
        return Markup("")
    named = Markup('<tspan dx="9" class="{}">{}</tspan>')
    return Markup("").join(named.format(look, label) for look, label in panel.curves)


def _curves(history: Sequence[Metrics], names: Mapping[str, str]) -> dict[str, Curve]:
    """The curves by label. Leaves out a curve that repeats another or has no finite value."""
    curves: dict[str, Curve] = {}
    for label, name in names.items():
        numbered = ((step, metrics.get(name, math.nan)) for step, metrics in enumerate(history, start=1))
        curve = {step: value for step, value in numbered if math.isfinite(value)}
        if curve and curve not in curves.values():
            curves[label] = curve
    return curves


def _lines(look: str, curve: Curve, scale: Scale, most_points: int) -> Markup:
    """Draws few steps as dots on a line, and many as a faint line under their running mean."""
    points = _thinned([*curve.items()], most_points)
    if len(curve) <= MOST_DOTS:
        return _line(look, points, scale) + _dots(look, points, scale)
    values = list(curve.values())
    kept = _thinned([*enumerate(curve, start=1)], most_points)
    recent = [(step, mean(values[max(0, i - WINDOW) : i])) for i, step in kept]
    return _line(f"{look} faint", points, scale) + _line(look, recent, scale)


def _line(look: str, points: Sequence[tuple[int, float]], scale: Scale) -> Markup:
    path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in points)
    return Markup('<polyline class="{}" points="{}"/>').format(look, path)


def _dots(look: str, points: Sequence[tuple[int, float]], scale: Scale) -> Markup:
    """Draws lines of no length: their round ends are the dots."""
    path = "".join(f"M{scale.x(step):.1f},{scale.y(value):.1f}h0" for step, value in points)
    return Markup('<path class="{} dots" d="{}"/>').format(look, path)


def _thinned(points: Sequence[T], most_points: int) -> Sequence[T]:
    """At most `most_points` of the points, evenly spaced, always with the last one."""
    stride = -(-len(points) // most_points)
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
    """The scale of these curves. It includes zero, because a zoomed axis makes noise look like a trend."""
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
