"""What stands behind the figures of a classification: curves, calibration, calls.

All of one class against the rest, by unit: what has a label of its own, a patient unless the study
says another. Intervals of shares are Wilson's (1927), which hold where all or none are called
rightly. Units of one patient are no independent ones: such a share counts as many as its design
effect leaves (Rao and Scott 1992, ratio estimator of clusters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_fl.metrics.figures import Estimate

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]

MOST_POINTS = 200
"""Points of a curve that is told; more are thinned evenly."""

CALIBRATION_BINS = 10
_Z = 1.959963984540054


@dataclass(frozen=True)
class Point:
    """A point of a curve: at a score of ``threshold`` or more the class is called.

    Attributes:
        threshold: in [0, 1]; above 1 where nobody is called.
        sensitivity: share of the units with the class that are called (recall).
        false_positive_rate: share of those without that are called.
        precision: share of the called that have the class; 1 where none is called.
    """

    threshold: float
    sensitivity: float
    false_positive_rate: float
    precision: float


@dataclass(frozen=True)
class CalibrationBin:
    """Units whose scores lie beside each other, a tenth of all.

    Attributes:
        units: how many.
        score: their mean score.
        share: of them that have the class, with its interval.
    """

    units: int
    score: float
    share: Estimate


@dataclass(frozen=True)
class Rate:
    """A share of units that comes of calling a class.

    Attributes:
        name: sensitivity, specificity, positive_predictive_value or negative_predictive_value; the
            last two depend on how many have the class.
        estimate: the share; None of none.
        units: of how many.
        patients: how many have these.
    """

    name: str
    estimate: Estimate | None
    units: int
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
        true_positive, false_negative, false_positive, true_negative: units.
        rates: sensitivity, specificity and the two predictive values, in this order.
    """

    threshold: float
    true_positive: int
    false_negative: int
    false_positive: int
    true_negative: int
    rates: tuple[Rate, ...]

    @property
    def point(self) -> Point | None:
        """The same as a point of the curves; None where a class has no patient."""
        sensitivity, specificity, precision = (one.estimate for one in self.rates[:3])
        if sensitivity is None or specificity is None:
            return None
        called = 1.0 if precision is None else precision.value
        return Point(self.threshold, sensitivity.value, 1 - specificity.value, called)


def share(hits: Booleans, owners: Integers | None = None) -> Estimate | None:
    """A share of units with its 95 % interval; None of none.

    Args:
        hits: (U,) which of the units count.
        owners: (U,) the patient of each unit; None where each is a patient of its own.
    """
    if not len(hits):
        return None
    value, units = float(hits.mean()), _effective(hits, owners)
    spread = _Z**2 / units
    middle = (value + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(value * (1 - value) / units + spread / 4 / units)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value, min(low, value), max(high, value))


def _effective(hits: Booleans, owners: Integers | None) -> float:
    """How many independent units say as much; the patients where all or none hit, or one is there:
    how alike a patient's units are cannot be seen then."""
    units, value = len(hits), float(hits.mean())
    if owners is None:
        return units
    of_unit = np.unique(owners, return_inverse=True)[1]
    sizes, sums = np.bincount(of_unit), np.bincount(of_unit, weights=hits)
    patients = len(sizes)
    if patients == 1 or value in {0.0, 1.0}:
        return patients
    spread = float(((sums - value * sizes) ** 2).sum()) * patients / (patients - 1) / units**2
    # Of clusters that vary less than chance would have it, no more is made than their units.
    return min(float(units), value * (1 - value) / spread) if spread else float(units)


def curve(is_class: Booleans, scores: Floats) -> tuple[Point, ...]:
    """The points of the ROC and the precision-recall curve, from nobody called to everybody.

    Args:
        is_class: (U,) which unit has the class; at least one has, and one has not.
        scores: (U,) in [0, 1].
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


def calibration(
    is_class: Booleans, scores: Floats, owners: Integers | None = None
) -> tuple[CalibrationBin, ...]:
    """Mean score beside the share with the class, in bins of equally many units.

    Args:
        is_class, scores: see ``curve``.
        owners: see ``share``.
    """
    order = np.argsort(scores, kind="stable")
    bins = []
    for places in np.array_split(order, min(CALIBRATION_BINS, len(order))):
        of_bin = share(is_class[places], None if owners is None else owners[places])
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


def calls(
    is_class: Booleans, scores: Floats, threshold: float, owners: Integers | None = None
) -> Calls:
    """Count which units are called at a threshold, and which have the class.

    Args:
        is_class, scores: see ``curve``.
        threshold: in [0, 1].
        owners: see ``share``.
    """
    called = scores >= threshold

    def rate(name: str, of: Booleans, hits: Booleans) -> Rate:
        theirs = None if owners is None else owners[of]
        units = int(of.sum())
        patients = units if theirs is None else len(np.unique(theirs))
        return Rate(name, share(hits[of], theirs), units, patients)

    return Calls(
        threshold,
        int((called & is_class).sum()),
        int((~called & is_class).sum()),
        int((called & ~is_class).sum()),
        int((~called & ~is_class).sum()),
        (
            rate("sensitivity", is_class, called),
            rate("specificity", ~is_class, ~called),
            rate("positive_predictive_value", called, is_class),
            rate("negative_predictive_value", ~called, ~is_class),
        ),
    )
