"""Which checkpoint is the best, and when a run stops, on histories made by hand."""

import math

import pytest

from cat_grpo.config import TrainConfig
from cat_grpo.metrics import SCORE, WINDOW
from cat_grpo.run.stopping import alarm, is_best, label_free_score

CALM = TrainConfig(max_consensus=0.875, max_failure_frac=0.5, patience=2)


def scores(*values: float | None) -> list[dict[str, float]]:
    """A history with a score at every checkpoint's step, None for a step without one."""
    return [{} if value is None else {SCORE: value} for value in values]


def history(consensus: list[float], entropy: list[float]) -> list[dict[str, float]]:
    return [
        {"consensus/majority_frac": c, "policy/entropy": e} for c, e in zip(consensus, entropy, strict=True)
    ]


FALLING = [2.0 - 0.1 * i for i in range(WINDOW)]


def test_the_label_free_score_is_the_mean_total_reward_of_the_last_steps():
    steps = [{"reward/total_mean": value} for value in (0.9, 0.1, 0.2, 0.6)]
    assert label_free_score(steps, 3) == pytest.approx(0.3)
    assert label_free_score(steps, 9) == pytest.approx(0.45)
    assert label_free_score([*steps, {"reward/mean": 1.0}], 3) == pytest.approx(0.4)  # 0.2, 0.6 and a gap
    assert math.isnan(label_free_score([{}], 1))


def test_the_best_beats_all_before_it():
    assert is_best(scores(0.5))
    assert is_best(scores(0.5, None, 0.4, 0.6))
    assert not is_best(scores(0.5, 0.4))
    assert not is_best(scores(0.5, 0.7, 0.6))
    assert not is_best(scores(0.5, 0.5))  # the earlier of equals is nearer to the anchor


def test_a_checkpoint_that_could_not_be_scored_stands_in_nobodys_way():
    assert is_best(scores(math.nan, 0.1))
    assert not is_best(scores(0.1, math.nan))
    assert not is_best(scores(0.1, math.nan, 0.1))


def test_consensus_alone_is_no_alarm():
    assert alarm(history([0.95] * WINDOW, [1.0] * WINDOW), CALM) is None
    assert alarm(history([0.95] * WINDOW, FALLING[::-1]), CALM) is None


def test_falling_entropy_alone_is_no_alarm():
    assert alarm(history([0.875] * WINDOW, FALLING), CALM) is None  # at the limit, not over it


def test_consensus_while_entropy_falls_is_an_alarm():
    reason = alarm(history([0.95] * WINDOW, FALLING), CALM)
    assert reason == "rollouts agree in 95% while entropy falls: nothing is left to reconcile"


def test_consensus_is_the_mean_of_the_last_ten_steps():
    # (9 * 0.92 + 0.4) / 10 = 0.868 is under the limit, and the last nine alone are no ten steps
    assert alarm(history([0.4, *[0.92] * 9], FALLING), CALM) is None
    assert alarm(history([0.92] * 9, FALLING[:9]), CALM) is None
    assert alarm(history([0.0, *[0.92] * 10], [3.0, *FALLING]), CALM)
    assert WINDOW == 10


def test_a_consensus_that_nobody_limits_is_no_alarm():
    config = CALM.model_copy(update={"max_consensus": None})
    assert alarm(history([1.0] * WINDOW, FALLING), config) is None


def test_open_problems_have_no_consensus():
    assert alarm([{"policy/entropy": value} for value in FALLING], CALM) is None


def test_a_share_of_failures_over_the_limit_is_an_alarm():
    assert alarm([{"reward/dropped_frac": 0.5}], CALM) is None
    assert alarm([{"reward/dropped_frac": 0.51}], CALM) == "51% of the last step's rollouts have no reward"
    assert alarm([{"reward/dropped_frac": 0.9}, {"reward/dropped_frac": 0.0}], CALM) is None  # it is over


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ((0.5, 0.4), False),
        ((0.5, 0.4, 0.4), True),
        ((0.5, None, 0.4, None), False),  # steps without a checkpoint are not counted
        ((0.5, 0.4, 0.6), False),
        ((0.5, 0.4, 0.6, 0.6, 0.6), True),  # as good is no better
        ((0.5, math.nan, math.nan), True),
        ((math.nan, math.nan, 0.1), False),
        ((), False),
    ],
)
def test_patience_counts_checkpoints_since_the_best(values, stops):
    reason = alarm([{}, *scores(*values)], CALM)
    assert reason == ("2 checkpoints in a row were no better than the best" if stops else None)


def test_without_patience_a_run_goes_on():
    assert alarm(scores(0.5, *[0.1] * 50), TrainConfig()) is None
