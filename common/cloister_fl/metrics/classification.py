"""Classification metrics: AUROC, AUPRC and balanced accuracy, with intervals.

The unit is the patient, never the image: a patient with thirty images counts once, and the
interval speaks of new patients. Intervals hold 95 % and come from a stratified bootstrap over
patients (each class keeps its size; percentiles, widened where needed to hold the value). The
resamples are drawn from a fixed seed, so the same figures give the same interval everywhere.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
"""Bootstrap resamples; the percentiles then move by about 0.1 of the interval's width."""

BINS = 256
"""Bins of a score histogram over [0, 1]; even, so that 0.5 is an edge."""

_SEED = 20_240_229
_TAIL = 0.025
_Z = 1.959963984540054
_SLACK = 1e-5
"""A float32 softmax may leave [0, 1] by rounding; such values are clipped, others refused."""
_CELLS = 1 << 22
"""Weights held in memory at a time, so that a large cohort costs time and not memory."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class MetricsInputInvalid(ValueError):
    """Labels, probabilities or counts do not have the form that is asked for."""


@dataclass(frozen=True)
class Estimate:
    """A figure in [0, 1] with its 95 % interval; ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name, ready for ``json.dumps``."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Metrics:
    """What a model was measured to do on a group of patients.

    Attributes:
        auroc: area under the ROC curve; ``None`` where a class has no patient.
        auprc: average precision (of class 1, or the mean over classes); ``None`` likewise.
        balanced_accuracy: mean recall over the classes; ``None`` likewise.
        patients: number of patients measured.
        class_counts: patients of each class, in the order of the study's classes.
        dice: mean Dice coefficient over the patients in whom something is marked; of a
            segmentation, which has none of the figures above. ``None`` without such patients.
    """

    auroc: Estimate | None
    auprc: Estimate | None
    balanced_accuracy: Estimate | None
    patients: int
    class_counts: tuple[int, ...]
    dice: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """A dictionary ready for ``json.dumps``; undefined figures are ``None``."""
        outlined = {"dice": self.dice.to_json()} if self.dice else {}
        return outlined | {
            "auroc": self.auroc.to_json() if self.auroc else None,
            "auprc": self.auprc.to_json() if self.auprc else None,
            "balanced_accuracy": (
                self.balanced_accuracy.to_json() if self.balanced_accuracy else None
            ),
            "patients": self.patients,
            "class_counts": list(self.class_counts),
        }


def patient_scores(image_probs: ArrayLike, patient_of_image: ArrayLike) -> Floats:
    """Average the probabilities of each patient's images.

    Args:
        image_probs: (N, K) probabilities, one row an image.
        patient_of_image: (N,) index of each image's patient, 0 to P - 1; no patient is skipped.

    Returns:
        (P, K), row p for patient p.

    Raises:
        MetricsInputInvalid: wrong shapes or values, or a patient below the largest index has no
            image: rows would then no longer line up with the labels.
    """
    probs = _probabilities(image_probs)
    owners = _indices(patient_of_image, "patient_of_image")
    if len(owners) != len(probs):
        raise MetricsInputInvalid("image_probs and patient_of_image differ in length.")
    images = np.bincount(owners)
    if np.any(images == 0):
        raise MetricsInputInvalid("a patient below the largest index has no image.")
    sums = [np.bincount(owners, weights=column, minlength=len(images)) for column in probs.T]
    return np.clip(np.stack(sums, axis=1) / images[:, None], 0.0, 1.0)


def measure(labels: ArrayLike, probs: ArrayLike) -> Metrics:
    """Measure patients' probabilities against their labels.

    Two classes: AUROC and AUPRC of class 1; a patient is called class 1 at a probability of 0.5
    or more. More classes: macro averages, one against the rest; the most probable class is
    called, the first of equals.

    Args:
        labels: (P,) class of each patient, 0 to K - 1.
        probs: (P, K) probabilities, K >= 2.

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
    if classes == 2:
        measured, called = [1], (scores[:, 1] >= 0.5).astype(np.int64)
    else:
        measured, called = list(range(classes)), np.argmax(scores, axis=1)
    if np.any(counts == 0):
        return Metrics(None, None, None, len(truth), _as_counts(counts))

    curves = [Curve(scores[:, k], truth == k) for k in measured]
    right = called == truth

    def figures(weights: Floats) -> Floats:
        areas = np.mean([curve.areas(weights) for curve in curves], axis=0)
        recalls = [weights[:, truth == k] @ right[truth == k] / counts[k] for k in range(classes)]
        return np.concatenate([areas, np.mean(recalls, axis=0)[None]])

    value = figures(np.ones((1, len(truth))))[:, 0]
    drawn = _resampled(figures, lambda rng, rows: _patients(rng, rows, truth, counts), len(truth))
    auroc, auprc, balanced = (_estimate(value[i], drawn[i]) for i in range(3))
    return Metrics(auroc, auprc, balanced, len(truth), _as_counts(counts))


def histogram(
    labels: ArrayLike, probs_of_class1: ArrayLike, bins: int = BINS, classes: int = 2
) -> Integers:
    """Count patients by class and by score, the form in which sites may add up their figures.

    Exact counts tell of single patients: a site sends them only where privacy is off.

    Args:
        labels: (P,) class of each patient, 0 to ``classes`` - 1.
        probs_of_class1: (P,) scores in [0, 1].
        bins: equal bins over [0, 1]; even, so that 0.5 is an edge. 1.0 falls into the last one.

    Returns:
        (classes, bins) counts; they sum to P.

    Raises:
        MetricsInputInvalid: wrong shapes or values.
    """
    if bins < 2 or bins % 2:
        raise MetricsInputInvalid("bins must be an even number of at least 2.")
    truth = _indices(labels, "labels")
    scores = np.asarray(probs_of_class1, dtype=np.float64)
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
    table = np.asarray(counts)
    if table.ndim != 2 or table.shape[0] != 2 or table.shape[1] < 2 or table.shape[1] % 2:
        raise MetricsInputInvalid("counts must have the shape (2, an even number of bins).")
    if not np.issubdtype(table.dtype, np.integer) or np.any(table < 0):
        raise MetricsInputInvalid("counts must be whole numbers of at least 0.")
    bins = table.shape[1]
    sizes = table.sum(axis=1)
    patients = int(sizes.sum())
    if np.any(sizes == 0):
        return Metrics(None, None, None, patients, _as_counts(sizes))

    # Each cell is one "patient" that weighs as much as it counts.
    cells = table.astype(np.float64).reshape(1, -1)
    is_one = np.repeat([False, True], bins)
    curve = Curve(np.tile(np.arange(bins, dtype=np.float64), 2), is_one)
    called_one = np.tile(np.arange(bins) >= bins // 2, 2)

    def figures(weights: Floats) -> Floats:
        hits = weights * (called_one == is_one)
        recalls = (hits[:, ~is_one].sum(1) / sizes[0] + hits[:, is_one].sum(1) / sizes[1]) / 2
        return np.concatenate([curve.areas(weights), recalls[None]])

    def draw(rng: np.random.Generator, rows: int) -> Floats:
        return np.concatenate(
            [rng.multinomial(sizes[k], table[k] / sizes[k], size=rows) for k in (0, 1)], axis=1
        ).astype(np.float64)

    value = figures(cells)[:, 0]
    drawn = _resampled(figures, draw, 2 * bins)
    auroc = _hanley_mcneil(float(value[0]), int(sizes[1]), int(sizes[0]))
    auprc, balanced = (_estimate(value[i], drawn[i]) for i in (1, 2))
    return Metrics(auroc, auprc, balanced, patients, _as_counts(sizes))


class Curve:
    """One class against the rest: sorted once, then measured for any weights of the patients."""

    def __init__(self, scores: Floats, is_class: NDArray[np.bool_]) -> None:
        # Best first; the stable sort keeps the figures the same whatever the platform's sort.
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        self._ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self._sign = is_class[self._order].astype(np.float64)

    def areas(self, weights: Floats) -> Floats:
        """AUROC and average precision, (2, R), for weights (R, P) with both classes present."""
        ranked = weights[:, self._order]
        # Only the ends of a run of equal scores are points of the curves: ties share a threshold.
        hits = np.cumsum(ranked * self._sign, axis=1)[:, self._ends]
        called = np.cumsum(ranked, axis=1)[:, self._ends]
        new_hits = np.diff(hits, axis=1, prepend=0.0)
        false = called - hits
        new_false = np.diff(false, axis=1, prepend=0.0)
        positives, negatives = hits[:, -1], false[:, -1]
        auroc = np.sum(new_false * (hits - new_hits / 2), axis=1) / (positives * negatives)
        precision = hits / np.maximum(called, 1.0)
        return np.stack([auroc, np.sum(new_hits * precision, axis=1) / positives])


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
    probs = np.asarray(given, dtype=np.float64)
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise MetricsInputInvalid("probabilities must have the shape (N, K) with K >= 2.")
    return _clipped(probs)


def _clipped(probs: Floats) -> Floats:
    # Written so that NaN fails too.
    if not np.all((probs >= -_SLACK) & (probs <= 1 + _SLACK)):
        raise MetricsInputInvalid("a probability is not a number from 0 to 1.")
    return np.clip(probs, 0.0, 1.0)


def _indices(given: ArrayLike, name: str) -> Integers:
    array = np.asarray(given)
    if array.ndim != 1:
        raise MetricsInputInvalid(f"{name} must have one dimension.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise MetricsInputInvalid(f"{name} must be whole numbers.")
    if np.any(array < 0):
        raise MetricsInputInvalid(f"{name} must not be below 0.")
    return array.astype(np.int64)


def _as_counts(counts: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(count) for count in counts)
