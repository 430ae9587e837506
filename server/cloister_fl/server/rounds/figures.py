"""Figures of a round: from metrics or histograms to a checkpoint's row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cloister_fl.metrics.classification import Estimate, Metrics, measure_histogram
from cloister_fl.metrics.dice import measure_dice_histogram
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.study.schema import Study


def figures_of(figures: Figures, metrics: Metrics) -> Figures:
    """Return ``figures`` with the metrics filled in."""

    def three(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
        if estimate is None:
            return None, None, None
        return estimate.value, estimate.low, estimate.high

    auroc, auroc_low, auroc_high = three(metrics.auroc)
    auprc, auprc_low, auprc_high = three(metrics.auprc)
    balanced, balanced_low, balanced_high = three(metrics.balanced_accuracy)
    dice, dice_low, dice_high = three(metrics.dice)
    return replace(
        figures,
        auroc=auroc,
        auroc_low=auroc_low,
        auroc_high=auroc_high,
        auprc=auprc,
        auprc_low=auprc_low,
        auprc_high=auprc_high,
        balanced_accuracy=balanced,
        balanced_accuracy_low=balanced_low,
        balanced_accuracy_high=balanced_high,
        dice=dice,
        dice_low=dice_low,
        dice_high=dice_high,
    )


def measure_counts(total: Counts, study: Study) -> Metrics:
    """Metrics of the sites' summed score histograms, (curves, 2, bins).

    Those of a segmentation are of Dice coefficients. A target of more than two classes is averaged
    over its one-against-rest curves; averaging the ends of their intervals gives an interval that
    is at least as wide as the true one.
    """
    if study.target.segment:
        return measure_dice_histogram(total[0])
    measured = [measure_histogram(curve) for curve in total]
    if len(measured) == 1:
        return measured[0]
    return Metrics(
        auroc=_mean([m.auroc for m in measured]),
        auprc=_mean([m.auprc for m in measured]),
        balanced_accuracy=_mean([m.balanced_accuracy for m in measured]),
        patients=measured[0].patients,
        class_counts=tuple(int(curve[1].sum()) for curve in total),
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
