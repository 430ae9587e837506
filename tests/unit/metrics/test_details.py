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
    told = {one.name: (one.estimate and one.estimate.value, one.units) for one in found.rates}
    assert all(one.patients == one.units for one in found.rates)
    assert told == {
        "sensitivity": (2 / 3, 3),
        "specificity": (3 / 4, 4),
        "positive_predictive_value": (2 / 3, 3),
        "negative_predictive_value": (3 / 4, 4),
    }
    assert found.point is not None
    assert found.point.false_positive_rate == 0.25


def test_wilson_s_interval_of_ten_in_ten() -> None:
    found = share(np.ones(10, bool))
    assert found is not None
    # Wilson 1927: n / (n + z^2) = 10 / 13.8415.
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.7225, abs=5e-5)
    assert share(np.ones(0, bool)) is None


def test_calibration_bins_hold_everybody_once() -> None:
    has, scores = drawn(3, patients=47)
    bins = calibration(has, scores)
    assert sum(one.units for one in bins) == 47
    assert sum(one.units * one.share.value for one in bins) == pytest.approx(has.sum())
    assert [one.score for one in bins] == sorted(one.score for one in bins)


def _width(hits: np.ndarray, owners: np.ndarray | None = None) -> float:
    found = share(hits, owners)
    assert found is not None
    return found.high - found.low


def test_a_patient_s_images_do_not_narrow_an_interval_as_patients_do() -> None:
    """Twenty patients with ten images each, called alike: they say as much as twenty patients."""
    of_patients = np.arange(20) % 5 > 0
    hits, owners = of_patients.repeat(10), np.arange(20).repeat(10)
    assert _width(hits, owners) == pytest.approx(_width(of_patients), rel=0.03)
    assert _width(hits, owners) > 3 * _width(hits)
    # Where all are called rightly, nothing tells how alike a patient's images are.
    everybody = np.ones(200, bool)
    assert _width(everybody, owners) == _width(np.ones(20, bool))
    # Units that are a patient each are patients.
    assert _width(hits, np.arange(200)) == pytest.approx(_width(hits), rel=0.01)


def test_shares_of_examinations_hold_the_truth_as_often_as_they_say() -> None:
    """Patients differ in how often they are called; 95 of 100 intervals should hold the mean."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        sizes = rng.integers(1, 8, 60)
        rate = rng.beta(2, 1, 60)
        owners = np.arange(60).repeat(sizes)
        found = share(rng.random(len(owners)) < rate[owners], owners)
        assert found is not None
        held += found.low <= 2 / 3 <= found.high
    assert 0.92 < held / 400 <= 0.98
