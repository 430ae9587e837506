"""What stands behind the figures of a classification: curves, calibration, calls.

All of one class against the rest, by patient. Intervals of shares are Wilson's (1927), which hold
where all or none of the patients are called rightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_fl.metrics.figures import Estimate

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

MOST_POINTS = 200
"""Points of a curve that is told; more are thinned evenly."""

CALIBRATION_BINS = 10
_Z = 1.959963984540054


@dataclass(frozen=True)
class Point:
    """A point of a curve: at a score of ``threshold`` or more the class is called.

    Attributes:
        threshold: in [0, 1]; above 1 where nobody is called.
        sensitivity: share of the patients with the class who are called (recall).
        false_positive_rate: share of those without who are called.
        precision: share of the called who have the class; 1 where nobody is called.
    """

    threshold: float
    sensitivity: float
    false_positive_rate: float
    precision: float


@dataclass(frozen=True)
class CalibrationBin:
    """Patients whose scores lie beside each other, a tenth of all.

    Attributes:
        patients: how many.
        score: their mean score.
        share: of them who have the class, with its interval.
    """

    patients: int
    score: float
    share: Estimate


@dataclass(frozen=True)
class Rate:
    """A share of patients that comes of calling a class.

    Attributes:
        name: sensitivity, specificity, positive_predictive_value or negative_predictive_value; the
            last two depend on how many have the class.
        estimate: the share; None of nobody.
        patients: of how many.
    """

    name: str
    estimate: Estimate | None
    patients: int

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Calls:
    """What comes of calling a class at a threshold.

    Attributes:
        threshold: in [0, 1].
        true_positive, false_negative, false_positive, true_negative: patients.
    """

    threshold: float
    true_positive: int
    false_negative: int
    false_positive: int
    true_negative: int

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Sensitivity, specificity and the two predictive values, in this order."""
        hit, miss = self.true_positive, self.false_negative
        false, quiet = self.false_positive, self.true_negative
        return (
            Rate("sensitivity", share(hit, hit + miss), hit + miss),
            Rate("specificity", share(quiet, quiet + false), quiet + false),
            Rate("positive_predictive_value", share(hit, hit + false), hit + false),
            Rate("negative_predictive_value", share(quiet, quiet + miss), quiet + miss),
        )

    @property
    def point(self) -> Point | None:
        """The same as a point of the curves; None where a class has no patient."""
        sensitivity, specificity, precision = (one.estimate for one in self.rates[:3])
        if sensitivity is None or specificity is None:
            return None
        called = 1.0 if precision is None else precision.value
        return Point(self.threshold, sensitivity.value, 1 - specificity.value, called)


def share(hits: int, patients: int) -> Estimate | None:
    """A share of patients with Wilson's 95 % interval; None of nobody."""
    if patients == 0:
        return None
    value = hits / patients
    spread = _Z**2 / patients
    middle = (value + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(value * (1 - value) / patients + spread / 4 / patients)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value, min(low, value), max(high, value))


def curve(is_class: Booleans, scores: Floats) -> tuple[Point, ...]:
    """The points of the ROC and the precision-recall curve, from nobody called to everybody.

    Args:
        is_class: (P,) who has the class; at least one has, and one has not.
        scores: (P,) in [0, 1].
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(is_class[order])
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
    positives, negatives = int(is_class.sum()), int((~is_class).sum())
    told = [Point(2.0, 0.0, 0.0, 1.0)]
    for end in ends:
        hit, called = int(hits[end]), int(end) + 1
        told.append(
            Point(float(ranked[end]), hit / positives, (called - hit) / negatives, hit / called)
        )
    if len(told) <= MOST_POINTS:
        return tuple(told)
    kept = np.unique(np.linspace(0, len(told) - 1, MOST_POINTS).round().astype(int))
    return tuple(told[place] for place in kept)


def calibration(is_class: Booleans, scores: Floats) -> tuple[CalibrationBin, ...]:
    """Mean score beside the share with the class, in bins of equally many patients."""
    order = np.argsort(scores, kind="stable")
    bins = []
    for places in np.array_split(order, min(CALIBRATION_BINS, len(order))):
        of_bin = share(int(is_class[places].sum()), len(places))
        assert of_bin is not None
        bins.append(CalibrationBin(len(places), float(scores[places].mean()), of_bin))
    return tuple(bins)


def best_threshold(is_class: Booleans, scores: Floats) -> float:
    """The threshold of the largest balanced accuracy (Youden 1950), halfway between two scores.

    Of equals, the one that is nearest to 0.5; 0.5 where all scores are the same.

    Args:
        is_class, scores: see ``curve``.
    """
    levels = np.unique(scores)
    if len(levels) < 2:
        return 0.5
    between = (levels[1:] + levels[:-1]) / 2
    high, low = np.sort(scores[is_class]), np.sort(scores[~is_class])
    sensitivity = 1 - np.searchsorted(high, between) / len(high)
    specificity = np.searchsorted(low, between) / len(low)
    value = sensitivity + specificity
    best = between[value >= value.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def calls(is_class: Booleans, scores: Floats, threshold: float) -> Calls:
    """Count who is called at a threshold, and who has the class."""
    called = scores >= threshold
    return Calls(
        threshold,
        int((called & is_class).sum()),
        int((~called & is_class).sum()),
        int((called & ~is_class).sum()),
        int((~called & ~is_class).sum()),
    )
