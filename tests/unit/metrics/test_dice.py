"""Dice by hand, by patient and from counts."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.metrics.classification import histogram
from cloister_fl.metrics.dice import coefficient, measure_dice, measure_dice_histogram
from cloister_fl.metrics.figures import MetricsInputInvalid


def test_a_coefficient_by_hand() -> None:
    marked = np.array([[1, 1, 0], [0, 1, 0]], bool)
    found = np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert coefficient(marked, found) == 2 * 2 / (3 + 3)
    assert coefficient(marked, marked) == 1
    assert coefficient(marked, ~marked) == 0
    assert coefficient(marked, np.zeros_like(marked)) == 0
    assert coefficient(np.zeros_like(marked), np.zeros_like(marked)) == 1


def test_the_mean_is_over_patients_with_something_marked() -> None:
    measured = measure_dice([1, 1, 0, 1], [0.5, 0.75, 0.0, 1.0])
    assert measured.dice is not None
    assert measured.dice.value == 0.75
    assert 0.5 <= measured.dice.low < 0.75 < measured.dice.high <= 1
    assert (measured.patients, measured.class_counts) == (4, (1, 3))
    assert measured.auroc is None
    assert measured.to_json()["dice"]["value"] == 0.75
    assert measure_dice([0, 0], [1.0, 0.0]).dice is None
    assert measure_dice([0], [1.0]).to_json()["dice"] is None


def test_the_cost_of_counts_does_not_follow_the_number_of_patients() -> None:
    """One site could end the coordinator's evaluation with a large number."""
    many = np.zeros((2, 256), np.int64)
    many[0, 3], many[1, 128], many[1, 255] = 1 << 40, 1 << 40, 1 << 40
    found = measure_dice_histogram(many)
    (dice,) = found.figures.values()
    assert dice is not None
    assert dice.value == pytest.approx((128.5 + 255.5) / 512)
    assert found.class_counts == (1 << 40, 1 << 41)


def test_counts_say_the_same_to_half_a_bin() -> None:
    rng = np.random.default_rng(3)
    labels, values = rng.integers(0, 2, 60), rng.uniform(0, 1, 60)
    values[:2] = 0.0, 1.0
    exact, counted = measure_dice(labels, values), measure_dice_histogram(histogram(labels, values))
    assert exact.dice is not None
    assert counted.dice is not None
    for end in ("value", "low", "high"):
        assert abs(getattr(exact.dice, end) - getattr(counted.dice, end)) <= 1 / 512
    assert counted.class_counts == exact.class_counts


@pytest.mark.parametrize(
    "given", [([0, 2], [0.1, 0.2]), ([0], [0.1, 0.2]), ([1], [1.5]), ([1], [float("nan")])]
)
def test_what_is_no_coefficient_is_refused(given: tuple[list[int], list[float]]) -> None:
    with pytest.raises(MetricsInputInvalid):
        measure_dice(*given)


@pytest.mark.parametrize("counts", [[[1, 2]], [[1.0], [2.0]], [[-1], [2]]])
def test_what_are_no_counts_is_refused(counts: object) -> None:
    with pytest.raises(MetricsInputInvalid):
        measure_dice_histogram(np.array(counts))
