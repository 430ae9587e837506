"""Classification metrics: AUROC, AUPRC and balanced accuracy, with intervals.

The unit is the patient, unless examinations or images have labels of their own: a patient with
thirty images counts once, and the interval speaks of new patients. Intervals hold 95 % and come
from a stratified bootstrap over patients (each class keeps its size; percentiles, widened where
needed to hold the value), where patients have several units too: a patient is drawn with all of
them (Davison and Hinkley 1997, 3.8). The resamples are drawn from a fixed seed, so the same figures
give the same interval everywhere.
A model that separates all patients at hand has an interval of width 0; that is the method's
blind spot with few patients, not certainty.

More than two classes are measured one against the rest and averaged with equal weight (macro).
A class without a patient leaves all three figures undefined: they are ``None``, since an average
over the other classes could not be compared with another round's. Malformed input raises.

Sources: Bamber 1975 (AUROC as a rank statistic, ties count half); Hanley and McNeil 1982
(standard error of AUROC from counts); Efron and Tibshirani 1993 (percentile bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cloister_fl.metrics.curves import Curve
from cloister_fl.metrics.figures import (
    MOST_PATIENTS,
    Estimate,
    Metrics,
    MetricsInputInvalid,
    array_of,
    of_classes,
)

RESAMPLES = 1000
"""Bootstrap resamples; the percentiles then move by about 0.1 of the interval's width."""

BINS = 256
"""Bins of a score histogram over [0, 1]; even, so that 0.5 is an edge."""

_MOST_BINS = 1 << 16
_SEED = 20_240_229
_TAIL = 0.025
_Z = 1.959963984540054
_SLACK = 1e-5
"""A float32 softmax may leave [0, 1] by rounding; such values are clipped, others refused."""
_CELLS = 1 << 22
"""Weights held in memory at a time, so that a large cohort costs time and not memory."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def measure(labels: ArrayLike, probs: ArrayLike, patients: ArrayLike | None = None) -> Metrics:
    """Measure probabilities of patients, or of patients' examinations or images, against labels.

    A patient's probabilities are the mean over the patient's images; that is what the figures of a
    run are measured on.

    Two classes: AUROC and AUPRC of class 1; a patient is called class 1 at a probability of 0.5
    or more. More classes: macro averages, one against the rest; the most probable class is
    called, the first of equals.

    Args:
        labels: (P,) class of each patient, or of another unit, 0 to K - 1.
        probs: (P, K) probabilities, K >= 2.
        patients: (P,) whole numbers, equal for units of one patient; None where each is a patient
            of its own. All units count alike. In a resample, patients who have the same set of
            classes stand for each other, so each class stays there; a set that one patient alone
            has makes intervals a little too narrow.

    Returns:
        Figures; how many patients there are, and how many units have each class.

    Raises:
        MetricsInputInvalid: wrong shapes, a label or a probability out of range, or not finite.
    """
    scores = _probabilities(probs)
    truth = _indices(labels, "labels")
    classes = scores.shape[1]
    if len(truth) != len(scores):
        raise MetricsInputInvalid("labels and probs differ in length.")
    if len(truth) and int(truth.max()) >= classes:
        raise MetricsInputInvalid("a label names a class that probs has no column for.")
    counts = np.bincount(truth, minlength=classes)
    owners, total = None, len(truth)
    if patients is not None:
        owners = _indices(patients, "patients")
        if len(owners) != len(truth):
            raise MetricsInputInvalid("labels and patients differ in length.")
        owners = np.unique(owners, return_inverse=True)[1]
        total = int(owners.max()) + 1 if len(owners) else 0
    if classes == 2:
        measured, called = [1], (scores[:, 1] >= 0.5).astype(np.int64)
    else:
        measured, called = list(range(classes)), np.argmax(scores, axis=1)
    if np.any(counts == 0):
        return _unmeasured(total, counts)

    curves = [Curve(scores[:, k], truth == k) for k in measured]
    right = called == truth

    def figures(weights: Floats) -> Floats:
        of_curves = np.mean([curve.figures(weights) for curve in curves], axis=0)
        of_class = [(weights[:, truth == k], right[truth == k]) for k in range(classes)]
        recalls = [theirs @ hit / theirs.sum(axis=1) for theirs, hit in of_class]
        return np.concatenate([of_curves, np.mean(recalls, axis=0)[None]])

    value = figures(np.ones((1, len(truth))))[:, 0]

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        if owners is None:
            return _patients(rng, rows, truth, counts)
        strata = _alike(owners, truth, classes)
        return _patients(rng, rows, strata, np.bincount(strata))[:, owners]

    drawn = _resampled(figures, draw, len(truth))
    found = {name: _estimate(value[i], drawn[i]) for i, name in enumerate(of_classes())}
    return Metrics(found, total, _as_counts(counts))


def histogram(
    labels: ArrayLike, probs_of_class1: ArrayLike, bins: int = BINS, classes: int = 2
) -> Integers:
    """Count patients by class and by score, the form in which sites may add up their figures.

    Exact counts tell of single patients: a site sends them only where privacy is off.

    Args:
        labels: (P,) class of each patient, 0 to ``classes`` - 1.
        probs_of_class1: (P,) scores in [0, 1].
        bins: equal bins over [0, 1]; even, so that 0.5 is an edge. 1.0 falls into the last one.
        classes: how many there are, 1 or more.

    Returns:
        (classes, bins) counts; they sum to P.

    Raises:
        MetricsInputInvalid: wrong shapes or values.
    """
    if not _is_count(bins, 2) or bins % 2:
        raise MetricsInputInvalid(f"bins must be an even number from 2 to {_MOST_BINS}.")
    if not _is_count(classes, 1):
        raise MetricsInputInvalid(f"classes must be a whole number from 1 to {_MOST_BINS}.")
    truth = _indices(labels, "labels")
    scores = array_of(probs_of_class1, "scores").astype(np.float64)
    if scores.shape != truth.shape:
        raise MetricsInputInvalid("labels and scores differ in shape.")
    if len(truth) and int(truth.max()) >= classes:
        raise MetricsInputInvalid("a label names a class beyond the number of classes.")
    scores = _clipped(scores)
    cell = np.minimum((scores * bins).astype(np.int64), bins - 1)
    flat = np.bincount(truth * bins + cell, minlength=classes * bins)
    return flat.reshape(classes, bins).astype(np.int64)


def measure_histogram(counts: ArrayLike) -> Metrics:
    """Measure a binary model from the score histograms of both classes.

    Scores of one bin are ties: they count half in AUROC. AUROC's interval is Hanley and
    McNeil's; the others come from resampling the counts of each class.

    Args:
        counts: (2, bins) whole numbers >= 0, from ``histogram``; sums over sites are welcome.

    Raises:
        MetricsInputInvalid: another shape, an odd number of bins, or not counts.
    """
    table = array_of(counts, "counts")
    if table.ndim != 2 or table.shape[0] != 2 or table.shape[1] < 2 or table.shape[1] % 2:
        raise MetricsInputInvalid("counts must have the shape (2, an even number of bins).")
    if not np.issubdtype(table.dtype, np.integer) or np.any(table < 0):
        raise MetricsInputInvalid("counts must be whole numbers of at least 0.")
    if table.sum(dtype=np.float64) > MOST_PATIENTS:
        raise MetricsInputInvalid(f"counts must be {MOST_PATIENTS} in all at most.")
    table = table.astype(np.int64)
    bins = table.shape[1]
    sizes = table.sum(axis=1)
    patients = int(sizes.sum())
    if np.any(sizes == 0):
        return _unmeasured(patients, sizes)

    # Each cell is one "patient" that weighs as much as it counts.
    cells = table.astype(np.float64).reshape(1, -1)
    is_one = np.repeat([False, True], bins)
    curve = Curve(np.tile(np.arange(bins, dtype=np.float64), 2), is_one)
    called_one = np.tile(np.arange(bins) >= bins // 2, 2)

    def figures(weights: Floats) -> Floats:
        hits = weights * (called_one == is_one)
        recalls = (hits[:, ~is_one].sum(1) / sizes[0] + hits[:, is_one].sum(1) / sizes[1]) / 2
        return np.concatenate([curve.figures(weights), recalls[None]])

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        return np.concatenate(
            [rng.multinomial(sizes[k], table[k] / sizes[k], size=rows) for k in (0, 1)], axis=1
        ).astype(np.float64)

    value = figures(cells)[:, 0]
    drawn = _resampled(figures, draw, 2 * bins)
    found = {name: _estimate(value[i], drawn[i]) for i, name in enumerate(of_classes())}
    found["auroc"] = _hanley_mcneil(found["auroc"].value, int(sizes[1]), int(sizes[0]))
    return Metrics(found, patients, _as_counts(sizes))


def measure_histograms(counts: ArrayLike) -> Metrics:
    """Measure a model from the histograms of its curves: of one, as ``measure_histogram``.

    More are averaged, one class against the rest; averaging the ends of their intervals gives an
    interval that is at least as wide as the true one.

    Args:
        counts: (curves, 2, bins).

    Raises:
        MetricsInputInvalid: see ``measure_histogram``.
    """
    curves = list(np.asarray(counts))
    if not curves:
        raise MetricsInputInvalid("counts must have a curve.")
    measured = [measure_histogram(curve) for curve in curves]
    if len(measured) == 1:
        return measured[0]
    return Metrics(
        {name: _mean([one.get(name) for one in measured]) for name in of_classes()},
        measured[0].patients,
        tuple(int(curve[1].sum()) for curve in curves),
    )


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return None
    value, low, high = (
        float(np.mean([getattr(estimate, end) for estimate in known]))
        for end in ("value", "low", "high")
    )
    return Estimate(value, low, high)


def _unmeasured(patients: int, counts: NDArray[Any]) -> Metrics:
    return Metrics(dict.fromkeys(of_classes()), patients, _as_counts(counts))


def _resampled(
    figures: Callable[[Floats], Floats],
    draw: Callable[[np.random.Generator, int], Floats],
    width: int,
) -> Floats:
    rng = np.random.default_rng(_SEED)
    rows = max(1, min(RESAMPLES, _CELLS // width))
    parts = [
        figures(draw(rng, min(rows, RESAMPLES - start))) for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(parts, axis=1)


def _patients(rng: np.random.Generator, rows: int, truth: Integers, counts: Integers) -> Floats:
    """How often each patient was drawn, (rows, P); every class keeps its size."""
    weights = np.zeros((rows, len(truth)))
    for k, size in enumerate(counts):
        drawn = rng.integers(0, size, size=(rows, size))
        drawn += np.arange(rows)[:, None] * size
        weights[:, truth == k] = np.bincount(drawn.ravel(), minlength=rows * size).reshape(
            rows, size
        )
    return weights


def _alike(owners: Integers, truth: Integers, classes: int) -> Integers:
    """The stratum of each patient, from 0 without a gap: alike are those whose units have the same
    set of classes. Those of one class come first, in the order of the classes."""
    has = np.zeros((int(owners.max()) + 1, classes), np.int64)
    has[owners, truth] = 1
    sets = [tuple(np.flatnonzero(row).tolist()) for row in has]
    order = {one: place for place, one in enumerate(sorted(set(sets), key=lambda s: (len(s), s)))}
    return np.array([order[one] for one in sets], np.int64)


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = np.quantile(drawn, [_TAIL, 1 - _TAIL])
    return _bounded(float(value), float(low), float(high))


def _bounded(value: float, low: float, high: float) -> Estimate:
    value = min(max(value, 0.0), 1.0)
    return Estimate(value, max(0.0, min(low, value)), min(1.0, max(high, value)))


def _hanley_mcneil(area: float, positives: int, negatives: int) -> Estimate:
    both_positive = area / (2 - area)
    both_negative = 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (positives - 1) * (both_positive - area**2)
        + (negatives - 1) * (both_negative - area**2)
    ) / (positives * negatives)
    half = _Z * math.sqrt(max(variance, 0.0))
    return _bounded(area, area - half, area + half)


def _probabilities(given: ArrayLike) -> Floats:
    probs = array_of(given, "probabilities").astype(np.float64)
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise MetricsInputInvalid("probabilities must have the shape (N, K) with K >= 2.")
    return _clipped(probs)


def _clipped(probs: Floats) -> Floats:
    # Written so that NaN fails too.
    if not np.all((probs >= -_SLACK) & (probs <= 1 + _SLACK)):
        raise MetricsInputInvalid("a probability is not a number from 0 to 1.")
    return np.clip(probs, 0.0, 1.0)


def _indices(given: ArrayLike, name: str) -> Integers:
    array = array_of(given, name)
    if array.ndim != 1:
        raise MetricsInputInvalid(f"{name} must have one dimension.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise MetricsInputInvalid(f"{name} must be whole numbers.")
    if np.any(array < 0):
        raise MetricsInputInvalid(f"{name} must not be below 0.")
    return array.astype(np.int64)


def _is_count(value: Any, low: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and low <= int(value) <= _MOST_BINS


def _as_counts(counts: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(count) for count in counts)
