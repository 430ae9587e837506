"""The toy of docs/guides/add-a-metric.md: Youden's index at its best threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister_fl.metrics.curves import CurveFigure, Points

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def youden(points: Points) -> NDArray[np.float64]:
    """Sensitivity plus specificity less 1, at the threshold where it is largest (Youden 1950)."""
    found: NDArray[np.float64] = (
        points.hits / points.positives[:, None] - points.false / points.negatives[:, None]
    ).max(axis=1)
    return found.clip(0.0, 1.0)


ROW = CurveFigure("Youden's index", youden)
