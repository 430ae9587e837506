"""What is neither labels nor scores, masks nor counts is refused, and never measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cloister_fl.metrics import (
    Metrics,
    MetricsInputInvalid,
    dice_coefficient,
    histogram,
    measure,
    measure_dice,
    measure_dice_histogram,
    measure_histogram,
    measure_noised,
    title_of,
)

TABLE = [[1, 0], [0, 1]]
PROBS = [[0.5, 0.5], [0.2, 0.8]]
ONES = np.ones(4, int)

REFUSED: list[Callable[[], Any]] = [
    # Numpy would stretch one of them, and the coefficient be 3.
    lambda: dice_coefficient(np.ones((3, 1), bool), np.ones((1, 3), bool)),
    lambda: dice_coefficient([255, 255], [1, 1]),
    lambda: dice_coefficient(ONES, 2 * ONES),
    lambda: dice_coefficient([0.5], [1]),
    lambda: dice_coefficient([float("nan")], [1]),
    lambda: dice_coefficient("mask", "mask"),
    lambda: dice_coefficient(None, [1]),  # type: ignore[arg-type]
    lambda: dice_coefficient([[1], [1, 0]], [1]),
    lambda: measure(["0", "1"], PROBS),
    lambda: measure([0, 1], [["0.5", "0.5"], ["0.2", "0.8"]]),
    lambda: measure([0, 1], [[0.5], [0.2, 0.8]]),  # type: ignore[list-item]
    lambda: measure([0, None], PROBS),  # type: ignore[list-item]
    lambda: measure([0, 2], PROBS),
    lambda: measure([0, -1], PROBS),
    lambda: measure([0.0, 1.0], PROBS),
    lambda: measure({0, 1}, PROBS),  # type: ignore[arg-type]
    lambda: histogram([0, 1], [0.1, 0.9], bins=2.0),  # type: ignore[arg-type]
    lambda: histogram([0, 1], [0.1, 0.9], bins=True),
    lambda: histogram([0, 1], [0.1, 0.9], bins=10**12),
    lambda: histogram([0, 1], [0.1, 0.9], classes=0),
    lambda: histogram([0, 1], [0.1, 0.9], classes="2"),  # type: ignore[arg-type]
    lambda: histogram([0, 1], ["0.1", "0.9"]),
    lambda: measure_histogram("counts"),
    lambda: measure_histogram([["1", "0"], ["0", "1"]]),
    lambda: measure_histogram([[10**13, 0], [0, 1]]),
    lambda: measure_dice(["0", "1"], [0.5, 0.5]),
    lambda: measure_dice([0, 1], ["0.5", "0.5"]),
    lambda: measure_dice([0, 1], [0.5, None]),  # type: ignore[list-item]
    lambda: measure_dice_histogram(np.zeros((2, 0), int)),
    lambda: measure_dice_histogram([[10**13], [0]]),
    lambda: measure_noised([TABLE], "0"),  # type: ignore[arg-type]
    lambda: measure_noised([TABLE], True),
    lambda: measure_noised([TABLE], float("nan")),
    lambda: measure_noised([[["1", "0"], ["0", "1"]]], 1.0),
    lambda: measure_noised(np.zeros((1, 2, 0)), 1.0),
    lambda: measure_noised([[[1e300, 0.0], [0.0, 1.0]]], 1.0),
    lambda: title_of("accuracy"),
    lambda: title_of(["auroc"]),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_it_is_refused(place: int) -> None:
    with pytest.raises(MetricsInputInvalid):
        REFUSED[place]()


def test_masks_may_be_of_numbers_that_are_0_and_1() -> None:
    assert dice_coefficient([[1, 1], [0, 1]], [[1.0, 0.0], [0.0, 1.0]]) == 4 / 5
    assert dice_coefficient(np.array([255, 0]) > 0, [1, 0]) == 1.0


def test_nobody_is_measured_where_nobody_is_there() -> None:
    assert measure([], np.zeros((0, 2))).patients == 0
    assert measure_dice([], []).dice is None


@pytest.mark.parametrize(
    "told",
    [
        {"aurox": None},
        {"auroc": {"value": "x", "low": 0.1, "high": 0.9}},
        {"auroc": {"value": 0.5, "low": 0.6, "high": 0.9}},
        {"auroc": {"value": 0.5, "low": 0.1, "high": 1.5}},
        {"auroc": {"value": float("nan"), "low": 0.1, "high": 0.9}},
        {"auroc": 0.5},
        {"patients": -1},
        {"patients": 1.5},
        {"images": -1},
        {"class_counts": [1, "2"]},
        {"class_counts": None},
    ],
)
def test_figures_are_read_as_they_were_written_or_not_at_all(told: dict[str, Any]) -> None:
    whole = {
        "auroc": {"value": 0.5, "low": 0.1, "high": 0.9},
        "patients": 3,
        "images": 5,
        "class_counts": [1, 2],
    }
    assert Metrics.from_json(whole).to_json() == whole
    with pytest.raises((ValueError, KeyError, TypeError)):
        Metrics.from_json({**whole, **told})
