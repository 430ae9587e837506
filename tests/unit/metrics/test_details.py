"""Curves, calibration and calls, beside scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_curve

from cloister_fl.metrics.details import (
    MOST_POINTS,
    best_threshold,
    calibration,
    calls,
    curve,
    share,
)


def drawn(seed: int, patients: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    has = rng.random(patients) < 0.3
    has[:2] = (True, False)
    # Two digits, so that scores tie.
    return has, np.clip(0.4 * has + rng.normal(0.4, 0.2, patients), 0, 1).round(2)


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_scikit_learn_s(seed: int) -> None:
    has, scores = drawn(seed)
    false, true, thresholds = roc_curve(has, scores, drop_intermediate=False)
    found = curve(has, scores)
    assert [one.false_positive_rate for one in found] == pytest.approx(false)
    assert [one.sensitivity for one in found] == pytest.approx(true)
    assert [one.threshold for one in found[1:]] == pytest.approx(thresholds[1:])
    assert found[-1].precision == pytest.approx(has.mean())


def test_a_long_curve_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    has, scores = rng.random(5000) < 0.5, rng.random(5000)
    found = curve(has, scores)
    assert len(found) == MOST_POINTS
    assert (found[0].sensitivity, found[-1].sensitivity) == (0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better_than_the_chosen_one(seed: int) -> None:
    has, scores = drawn(seed)
    chosen = best_threshold(has, scores)
    value = balanced_accuracy_score(has, scores >= chosen)
    every = [balanced_accuracy_score(has, scores >= one) for one in np.linspace(0, 1.01, 500)]
    assert value == pytest.approx(max(every))
    assert chosen not in scores


def test_where_all_score_the_same_the_threshold_is_a_half() -> None:
    assert best_threshold(np.array([True, False]), np.array([0.9, 0.9])) == 0.5


def test_calls_are_counted_and_each_rate_says_of_how_many() -> None:
    has = np.array([True, True, True, False, False, False, False])
    scores = np.array([0.9, 0.5, 0.4, 0.6, 0.2, 0.1, 0.0])
    found = calls(has, scores, 0.5)
    assert (found.true_positive, found.false_negative) == (2, 1)
    assert (found.false_positive, found.true_negative) == (1, 3)
    told = {one.name: (one.estimate and one.estimate.value, one.patients) for one in found.rates}
    assert told == {
        "sensitivity": (2 / 3, 3),
        "specificity": (3 / 4, 4),
        "positive_predictive_value": (2 / 3, 3),
        "negative_predictive_value": (3 / 4, 4),
    }
    assert found.point is not None
    assert found.point.false_positive_rate == 0.25


def test_wilson_s_interval_of_ten_in_ten() -> None:
    found = share(10, 10)
    assert found is not None
    # Wilson 1927: n / (n + z^2) = 10 / 13.8415.
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.7225, abs=5e-5)
    assert share(0, 0) is None


def test_calibration_bins_hold_everybody_once() -> None:
    has, scores = drawn(3, patients=47)
    bins = calibration(has, scores)
    assert sum(one.patients for one in bins) == 47
    assert sum(one.patients * one.share.value for one in bins) == pytest.approx(has.sum())
    assert [one.score for one in bins] == sorted(one.score for one in bins)
