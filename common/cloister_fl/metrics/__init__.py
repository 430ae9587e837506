"""Metrics: AUROC, average precision, balanced accuracy and Dice, with their intervals.

The unit is the patient, never the image, and every interval holds 95 %. From labels and scores
(``measure``, ``measure_dice``), from exact counts that sites add up (``measure_histogram``,
``measure_dice_histogram``), and from noised ones (``measure_noised``)::

    from cloister_fl.metrics import measure

    found = measure([0, 0, 1, 1], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    assert found.auroc is not None and found.auroc.value == 0.75
"""

from cloister_fl.metrics.classification import histogram, measure, measure_histogram
from cloister_fl.metrics.dice import coefficient as dice_coefficient
from cloister_fl.metrics.dice import measure_dice, measure_dice_histogram
from cloister_fl.metrics.figures import Estimate, Metrics, MetricsInputInvalid, title_of
from cloister_fl.metrics.noisy import measure_noised

__all__ = [
    "Estimate",
    "Metrics",
    "MetricsInputInvalid",
    "dice_coefficient",
    "histogram",
    "measure",
    "measure_dice",
    "measure_dice_histogram",
    "measure_histogram",
    "measure_noised",
    "title_of",
]
