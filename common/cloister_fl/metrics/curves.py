"""Figures of a score curve: one class against the rest, at every threshold of the score.

A figure is a function of the patients with and without the class who score at least a threshold.
Written once, it is measured exactly, from histograms and from noised ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """The points of R curves at T falling thresholds; patients weigh what they weigh.

    Attributes:
        hits: (R, T) weight of the patients with the class at or above the threshold.
        false: (R, T) likewise without the class.
    """

    hits: Floats
    false: Floats

    @property
    def positives(self) -> Floats:
        """(R,) weight of all patients with the class; above 0."""
        total: Floats = self.hits[:, -1]
        return total

    @property
    def negatives(self) -> Floats:
        """(R,) weight of all patients without the class; above 0."""
        total: Floats = self.false[:, -1]
        return total


@dataclass(frozen=True)
class CurveFigure:
    """A figure of a curve.

    Attributes:
        title: what people call it, as in the middle of a sentence.
        of: from the points of R curves to R values in [0, 1].
    """

    title: str
    of: Callable[[Points], Floats]


def auroc(points: Points) -> Floats:
    """Area under the ROC curve (Bamber 1975): ties count half."""
    import numpy as np

    new_hits = np.diff(points.hits, axis=1, prepend=0.0)
    new_false = np.diff(points.false, axis=1, prepend=0.0)
    area: Floats = np.sum(new_false * (points.hits - new_hits / 2), axis=1)
    return area / (points.positives * points.negatives)


def average_precision(points: Points) -> Floats:
    """Mean precision over the patients with the class; ties share a threshold."""
    import numpy as np

    new_hits = np.diff(points.hits, axis=1, prepend=0.0)
    # At 1 at least: weights of resamples are whole, and a threshold that calls nobody hits nobody.
    precision = points.hits / np.maximum(points.hits + points.false, 1.0)
    mean: Floats = np.sum(new_hits * precision, axis=1) / points.positives
    return mean


CURVE_FIGURES: Mapping[str, CurveFigure] = {
    "auroc": CurveFigure("AUROC", auroc),
    "auprc": CurveFigure("average precision", average_precision),
}
"""The figures of a classification's curves, by name, in the order in which they are told."""


class Curve:
    """One class against the rest: sorted once, then measured for any weights of the patients.

    Args:
        scores: (P,).
        is_class: (P,) whether a patient has the class.
    """

    def __init__(self, scores: Floats, is_class: NDArray[np.bool_]) -> None:
        import numpy as np

        # Best first; the stable sort keeps the figures the same whatever the platform's sort.
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        self._ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self._sign = is_class[self._order].astype(np.float64)

    def figures(self, weights: Floats) -> Floats:
        """``CURVE_FIGURES``, (F, R), for weights (R, P) with both classes present."""
        import numpy as np

        ranked = weights[:, self._order]
        # Only the ends of a run of equal scores are points of the curve: ties share a threshold.
        hits = np.cumsum(ranked * self._sign, axis=1)[:, self._ends]
        called = np.cumsum(ranked, axis=1)[:, self._ends]
        points = Points(hits, called - hits)
        found: Floats = np.stack([figure.of(points) for figure in CURVE_FIGURES.values()])
        return found
