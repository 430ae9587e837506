"""Dice coefficient of segmentation masks (Dice 1945), by patient.

A patient's coefficient is 2 |A and B| / (|A| + |B|) over the pixels of all the patient's images,
A what is marked and B what the model segments. Where nothing is marked it tells only whether the
model kept silent, 1 or 0; such patients are counted and stay out of the mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cloister_fl.metrics.classification import RESAMPLES
from cloister_fl.metrics.figures import (
    MOST_PATIENTS,
    Estimate,
    Metrics,
    MetricsInputInvalid,
    array_of,
)

_SEED = 20_240_229
_TAIL = 0.025
_AT_ONCE = 1 << 22
"""Counts that are drawn at a time; bounds memory."""


def coefficient(marked: ArrayLike, shown: ArrayLike) -> float:
    """Dice coefficient of two masks of one shape, 0 to 1; 1 where both are empty.

    Args:
        marked: a mask of any shape, True or 1 where something is marked, else False or 0.
        shown: what a model segments, likewise.

    Raises:
        MetricsInputInvalid: the shapes differ, or a mask holds other values; the PNG files that
            ``predict`` writes hold 0 and 255, so compare those with 0 first.
    """
    one, other = _mask(marked, "marked"), _mask(shown, "shown")
    if one.shape != other.shape:
        # Numpy would stretch one of them.
        raise MetricsInputInvalid(f"masks have the shapes {one.shape} and {other.shape}.")
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def _mask(given: ArrayLike, name: str) -> NDArray[np.bool_]:
    mask = array_of(given, name)
    if mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all():
        raise MetricsInputInvalid(f"{name} holds values other than 0 and 1.")
    return mask.astype(np.bool_)


def measure_dice(labels: ArrayLike, coefficients: ArrayLike) -> Metrics:
    """Mean over the patients in whom something is marked, with a 95 % bootstrap interval.

    Args:
        labels: (P,) 1 where something is marked, else 0.
        coefficients: (P,) from 0 to 1.

    Raises:
        MetricsInputInvalid: wrong shapes or values.
    """
    truth = array_of(labels, "labels")
    values = array_of(coefficients, "coefficients").astype(np.float64)
    if truth.ndim != 1 or truth.shape != values.shape or not np.isin(truth, (0, 1)).all():
        raise MetricsInputInvalid("labels are 0 or 1, one for each coefficient.")
    if not np.all((values >= 0) & (values <= 1)):
        raise MetricsInputInvalid("a coefficient is not a number from 0 to 1.")
    counts = (int((truth == 0).sum()), int((truth == 1).sum()))
    # By value, so that the order of patients has no say in the interval.
    shown, times = np.unique(values[truth == 1], return_counts=True)
    return Metrics({"dice": _mean(shown, times)}, len(truth), counts)


def _mean(values: NDArray[np.float64], times: NDArray[np.int64]) -> Estimate | None:
    """The mean of values that occur several times; its cost follows how many differ."""
    total = int(times.sum())
    if not total:
        return None
    rng = np.random.default_rng(_SEED)
    at_once = max(1, _AT_ONCE // len(values))
    drawn = np.concatenate(
        [
            rng.multinomial(total, times / total, min(at_once, RESAMPLES - start)) @ values / total
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    value = float(times @ values) / total
    low, high = (float(end) for end in np.quantile(drawn, [_TAIL, 1 - _TAIL]))
    return Estimate(value, min(low, value), max(high, value))


def measure_dice_histogram(counts: ArrayLike) -> Metrics:
    """The same from counts, (2, bins): patients without and with something marked, by coefficient.

    Each counts as the middle of its bin, so the mean is off by half a bin at most.

    Raises:
        MetricsInputInvalid: another shape, or not counts.
    """
    table = array_of(counts, "counts")
    whole = np.issubdtype(table.dtype, np.integer)
    if table.ndim != 2 or table.shape[0] != 2 or not table.shape[1] or not whole:
        raise MetricsInputInvalid("counts must be whole numbers of shape (2, bins).")
    if np.any(table < 0) or table.sum(dtype=np.float64) > MOST_PATIENTS:
        raise MetricsInputInvalid(f"counts must be at least 0, and {MOST_PATIENTS} in all at most.")
    bins = table.shape[1]
    without, marked = (int(row.sum()) for row in table)
    dice = _mean((np.arange(bins) + 0.5) / bins, table[1].astype(np.int64))
    return Metrics({"dice": dice}, without + marked, (without, marked))
