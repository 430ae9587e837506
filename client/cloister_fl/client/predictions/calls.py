"""Calls of patients: which class a patient's mean scores come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_fl.model_file import OperatingPoint
from cloister_fl.system.text import counted

EVEN = 0.5
"""From which score the second of two classes is called where no operating point was chosen: that
of ``metrics.measure``."""


@dataclass(frozen=True)
class Rule:
    """How patients are called.

    Attributes:
        classes: two or more.
        positive: of two classes, the one that is called from a score on; else empty.
        threshold: the score, 0 to 1; None with more than two classes.
        chosen: the operating point of the model; None where none was chosen.
    """

    classes: tuple[str, ...]
    positive: str
    threshold: float | None
    chosen: OperatingPoint | None

    def call(self, scores: NDArray[np.float64]) -> str:
        """The class of a patient with these mean scores, (K,), one a class."""
        if self.threshold is None:
            return self.classes[int(np.argmax(scores))]
        place = self.classes.index(self.positive)
        return self.classes[place if scores[place] >= self.threshold else 1 - place]

    @property
    def told(self) -> str:
        """The rule in a sentence or two."""
        if self.threshold is None:
            return (
                "A patient is called the class with the highest mean score. "
                "No operating point was chosen for this model."
            )
        rule = (
            f"A patient is called {self.positive} at a mean score of {self.threshold:.6g} or more, "
            f"else {self.classes[1 - self.classes.index(self.positive)]}."
        )
        if self.chosen is None:
            return f"{rule} No operating point was chosen for this model."
        people = counted(self.chosen.patients, "patient")
        return f"{rule} This operating point was chosen on {people} of a hold-out."


def rule_of(classes: Sequence[str], point: OperatingPoint | None) -> Rule | None:
    """The rule for a model's classes; None where it scores no classes."""
    names = tuple(classes)
    if not names:
        return None
    if len(names) != 2:
        return Rule(names, "", None, None)
    if point is None:
        return Rule(names, names[1], EVEN, None)
    return Rule(names, point.positive, point.threshold, point)
