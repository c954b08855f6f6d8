"""Which checkpoint is the best, and when to stop, from the history of a run's metrics.

Label-free training rises and then falls (arXiv:2603.08660), and its reward may go on rising while it falls.
A labelled validation file, where the user has one, decides. Without labels the mean reward does, as long as
no alarm has gone off: a policy that agrees with itself leaves the anchor nothing to reconcile.
"""

import math
from collections.abc import Sequence

from cat_grpo.config import TrainConfig
from cat_grpo.metrics import Metrics, mean

WINDOW = 10
"""Steps over which a signal is averaged: single steps are noisy."""
SCORE = "selection/score"
"""The metric of a checkpoint's step that checkpoints are compared by."""


def label_free_score(history: Sequence[Metrics], num_steps: int) -> float:
    """Mean reward, penalties included, of the last `num_steps` steps."""
    return mean(
        metrics["reward/total_mean"] for metrics in history[-num_steps:] if "reward/total_mean" in metrics
    )


def is_best(history: Sequence[Metrics]) -> bool:
    """Whether the last step's checkpoint beats all before it."""
    scores = _scores(history)
    return all(scores[-1] > score for score in scores[:-1])


def alarm(history: Sequence[Metrics], config: TrainConfig) -> str | None:
    """Why the run should stop now, in one line; None to go on."""
    last = history[-1]
    if last.get("reward/dropped_frac", 0.0) > config.max_failure_frac:
        return f"{last['reward/dropped_frac']:.0%} of the last step's rollouts have no reward"
    consensus = _recent(history, "consensus/majority_frac")
    entropy = [metrics["policy/entropy"] for metrics in history if "policy/entropy" in metrics]
    falling = len(entropy) > 1 and entropy[-1] < entropy[0]
    if config.max_consensus is not None and consensus > config.max_consensus and falling:
        return f"rollouts agree in {consensus:.0%} while entropy falls: nothing is left to reconcile"
    if config.patience is not None and _checks_since_best(history) >= config.patience:
        return f"{config.patience} checkpoints in a row were no better than the best"
    return None


def _recent(history: Sequence[Metrics], name: str) -> float:
    """The mean of the last WINDOW steps; NaN, which is over no threshold, before there are as many."""
    values = [metrics[name] for metrics in history[-WINDOW:] if name in metrics]
    return mean(values) if len(values) == WINDOW else math.nan


def _scores(history: Sequence[Metrics]) -> list[float]:
    """Of the checkpoints, in order. NaN, when nothing could be scored, is worse than any score."""
    scores = (metrics[SCORE] for metrics in history if SCORE in metrics)
    return [-math.inf if math.isnan(score) else score for score in scores]


def _checks_since_best(history: Sequence[Metrics]) -> int:
    scores = _scores(history)
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
