"""Decides from a run's history which checkpoint is best, what is worth a look, and when to stop.

Label-free training rises and then falls (arXiv:2603.08660), and its reward may keep rising while it falls.
A labelled validation file, where the user has one, decides. Without labels the mean reward does, as long as
no alarm has gone off: a policy that agrees with itself leaves the anchor nothing to reconcile.
"""

import math
from collections.abc import Sequence

from cat_grpo.config import TrainConfig
from cat_grpo.metrics import SCORE, WINDOW, Metrics, mean

WARN_MISSING = 0.05
"""A larger share of rollouts without a reward, or of verdicts without an answer, is worth a look."""
WARN_CONSENSUS = 0.95
"""So is a larger share of rollouts that agree, while entropy falls: before `train.max_consensus` stops it."""


def label_free_score(history: Sequence[Metrics], num_steps: int) -> float:
    """Returns the mean reward, penalties included, of the last `num_steps` steps."""
    return mean(
        metrics["reward/total_mean"] for metrics in history[-num_steps:] if "reward/total_mean" in metrics
    )


def is_best(history: Sequence[Metrics]) -> bool:
    """Whether the last step's checkpoint beats all before it."""
    scores = _scores(history)
    return all(scores[-1] > score for score in scores[:-1])


def alarm(history: Sequence[Metrics], config: TrainConfig) -> str | None:
    """Returns why the run should stop now, in one line, or None."""
    last = history[-1]
    if last.get("reward/dropped_frac", 0.0) > config.max_failure_frac:
        return f"{last['reward/dropped_frac']:.0%} of the last step's rollouts have no reward"
    consensus = _recent(history, "consensus/majority_frac")
    if config.max_consensus is not None and consensus > config.max_consensus and _entropy_falls(history):
        return f"rollouts agree in {consensus:.0%} while entropy falls: nothing is left to reconcile"
    if config.patience is not None and _checks_since_best(history) >= config.patience:
        return f"{config.patience} checkpoints in a row were no better than the best"
    return None


def warnings(history: Sequence[Metrics]) -> dict[str, str]:
    """Returns what is worth a look before an alarm stops the run, by subject."""
    now = history[-1]
    found = {
        name: f"{now[name]:.1%} {words}"
        for name, words in (
            ("reward/dropped_frac", "of the rollouts have no reward"),
            ("rubric/abstained_frac", "of the verdicts are missing"),
        )
        if now.get(name, 0.0) > WARN_MISSING
    }
    if now.get("consensus/majority_frac", 0.0) > WARN_CONSENSUS and _entropy_falls(history):
        found["consensus"] = "rollouts nearly all agree while entropy falls: little is left to reconcile"
    scores = {step: metrics[SCORE] for step, metrics in enumerate(history, start=1) if SCORE in metrics}
    if scores and scores[max(scores)] < (best := max(scores.values())):
        step = next(step for step, score in scores.items() if score == best)
        found[SCORE] = f"the last checkpoint scores {scores[max(scores)]:.3f}, that of step {step} {best:.3f}"
    return found


def _entropy_falls(history: Sequence[Metrics]) -> bool:
    """Whether the last entropy that is known is below the first."""
    name = "policy/entropy"
    first = next((metrics[name] for metrics in history if name in metrics), math.nan)
    last = next((metrics[name] for metrics in reversed(history) if name in metrics), math.nan)
    return last < first


def _recent(history: Sequence[Metrics], name: str) -> float:
    """The mean of the last WINDOW steps; NaN, which is over no threshold, before there are as many."""
    values = [metrics[name] for metrics in history[-WINDOW:] if name in metrics]
    return mean(values) if len(values) == WINDOW else math.nan


def _scores(history: Sequence[Metrics]) -> list[float]:
    """The checkpoints' scores, in order. NaN, when nothing could be scored, is worse than any score."""
    scores = (metrics[SCORE] for metrics in history if SCORE in metrics)
    return [-math.inf if math.isnan(score) else score for score in scores]


def _checks_since_best(history: Sequence[Metrics]) -> int:
    scores = _scores(history)
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
