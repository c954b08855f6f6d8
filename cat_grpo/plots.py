"""A run's curves as one small picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cat_grpo.metrics import Metrics, mean
from cat_grpo.selection import SCORE, WINDOW

MAX_PNG_BYTES = 36_000
"""A dashboard may send all versions of a run's pictures to the browser at once."""
PANELS = {
    "Reward": {"reward": "reward/mean", "after penalties and KL": "reward/total_mean"},
    "Majority's share": {"majority": "consensus/majority_frac"},
    "Reference differs": {
        "from the majority": "reference/differs_from_majority_frac",
        "from every rollout": "reference/differs_from_all_frac",
    },
    "Rubric": {"criteria met": "rubric/satisfied_frac", "judge abstained": "rubric/abstained_frac"},
    "Checkpoints": {
        "pass@1": "validation/pass@1",
        "points F1": "validation/points_f1",
        "reference accuracy": "validation/reference_accuracy",
        "score to choose by": SCORE,
    },
    "Entropy, nats per token": {"entropy": "policy/entropy"},
    "KL to the anchor, nats": {"KL": "policy/kl"},
    "Length, tokens": {"rollout": "policy/tokens_per_rollout", "reference": "reference/tokens"},
}
NUM_COLUMNS = 3
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea")


def curves_png(history: Sequence[Metrics]) -> bytes:
    """The run so far as small multiples: each of PANELS that has something to show."""
    from matplotlib.figure import Figure

    panels = {title: curves for title, names in PANELS.items() if (curves := _curves(history, names))}
    num_rows = max(1, -(-len(panels) // NUM_COLUMNS))
    height = 2.1 * num_rows
    figure = Figure(figsize=(8.2, height))
    figure.subplots_adjust(0.055, 0.28 / height, 0.985, 1 - 0.32 / height, wspace=0.2, hspace=0.36)
    for position, (title, curves) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(num_rows, NUM_COLUMNS, position), title, curves)
    return _small_png(figure)


def _curves(history: Sequence[Metrics], names: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """By label: the value at each step, counted from 1. A curve that repeats another is left out."""
    curves: dict[str, dict[int, float]] = {}
    for label, name in names.items():
        curve = {step: metrics[name] for step, metrics in enumerate(history, start=1) if name in metrics}
        if curve and curve not in curves.values():
            curves[label] = curve
    return curves


def _draw(axes: Any, title: str, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Few steps as dots on a line; many faint, under their running mean."""
    for colour, (label, curve) in zip(COLOURS, curves.items(), strict=False):
        steps, values = list(curve), list(curve.values())
        if len(values) <= 2 * WINDOW:
            axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker="o", markersize=3)
        else:
            stride = 1 + len(values) // 250  # finer than the pixels is only bytes
            recent = [mean(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]
            axes.plot(steps[::stride], values[::stride], color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(steps[::stride], recent[::stride], color=colour, label=label, linewidth=1.6)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#111827")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.tick_params(labelsize=8, length=0, colors="#4b5563")
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.03, y=0.15)
    if axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)  # a zoomed axis makes noise look like a trend
    if len(curves) > 1:
        axes.legend(fontsize=7.5, frameon=False, labelcolor="#374151", handlelength=1.2)


def _small_png(figure: Any) -> bytes:
    """As sharp as fits. 32 colours are enough for lines: a third of the bytes."""
    from PIL import Image

    for dpi in (115, 85, 55):
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        few_colours = Image.open(drawn).convert("RGB").quantize(32, Image.Quantize.MAXCOVERAGE)
        few_colours.save(small, format="png", optimize=True)
        if small.tell() <= MAX_PNG_BYTES:
            break
    return small.getvalue()
