"""What a model was measured to do: figures with their intervals, and on how many patients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from cloister_fl.metrics.curves import CURVE_FIGURES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TITLES: Mapping[str, str] = {"balanced_accuracy": "balanced accuracy", "dice": "Dice"}

CALLED_TOLD = (
    "of two classes a patient is called at a score of 0.5 or more, of more the most probable one. "
    "Where all scores lie on one side of 0.5, it is 0.5, however well they rank the patients."
)
"""How patients are called for the balanced accuracy, to follow its name."""


def of_classes() -> tuple[str, ...]:
    """Names of the figures of a classification, in the order in which they are told."""
    return (*CURVE_FIGURES, "balanced_accuracy")


def title_of(name: str) -> str:
    """What people call a figure, as in the middle of a sentence.

    Raises:
        MetricsInputInvalid: there is no figure of that name.
    """
    titles = {each: figure.title for each, figure in CURVE_FIGURES.items()} | dict(_TITLES)
    if not isinstance(name, str) or name not in titles:
        raise MetricsInputInvalid(f"there is no such figure; known: {', '.join(titles)}.")
    return titles[name]


class MetricsInputInvalid(ValueError):
    """Labels, probabilities, masks or counts do not have the form that is asked for."""


MOST_PATIENTS = 1 << 42
"""Most patients that counts may come to; more are an error of whoever counts."""


def array_of(given: object, name: str) -> NDArray[Any]:
    """Numbers as an array.

    Raises:
        MetricsInputInvalid: it is something else, such as text or rows of different lengths.
    """
    import numpy as np

    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise MetricsInputInvalid(f"{name} must be numbers, as many in each row.")
    return array


@dataclass(frozen=True)
class Estimate:
    """A figure in [0, 1] with its 95 % interval; ``low <= value <= high``.

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end of the interval.
    """

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
        figures: by name, those that the task has; ``None`` where a figure is not
            defined, such as the AUROC where a class has no patient.
        patients: number of patients measured.
        class_counts: patients of each label, in the order of the task's ``strata``; where other
            units have labels of their own, units. Where sites count, a patient counts once in
            all.
        images: number of images that they were measured by; 0 where it is not known, as of counts.
    """

    figures: Mapping[str, Estimate | None]
    patients: int
    class_counts: tuple[int, ...]
    images: int = 0

    def get(self, name: str) -> Estimate | None:
        """The figure, or None where it is not defined or not one of the task."""
        return self.figures.get(name)

    @property
    def auroc(self) -> Estimate | None:
        """Area under the ROC curve."""
        return self.get("auroc")

    @property
    def auprc(self) -> Estimate | None:
        """Average precision, of class 1 or the mean over the classes."""
        return self.get("auprc")

    @property
    def balanced_accuracy(self) -> Estimate | None:
        """Mean recall over the classes."""
        return self.get("balanced_accuracy")

    @property
    def dice(self) -> Estimate | None:
        """Mean Dice coefficient over the patients in whom something is marked."""
        return self.get("dice")

    def to_json(self) -> dict[str, Any]:
        """A dictionary ready for ``json.dumps``; undefined figures are ``None``."""
        return {
            **{name: one and one.to_json() for name, one in self.figures.items()},
            "patients": self.patients,
            "images": self.images,
            "class_counts": list(self.class_counts),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Metrics:
        """Read what ``to_json`` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        rest = {"patients", "images", "class_counts"}
        figures = {name: _estimate(name, one) for name, one in told.items() if name not in rest}
        counts = (told["patients"], told["images"], *told["class_counts"])
        if not all(_is_number(one, Integral) and one >= 0 for one in counts):
            raise ValueError("patients are counted by whole numbers")
        return cls(figures, counts[0], counts[2:], counts[1])


def _estimate(name: str, told: Mapping[str, Any] | None) -> Estimate | None:
    title_of(name)
    if told is None:
        return None
    estimate = Estimate(**told)
    ends = (0.0, estimate.low, estimate.value, estimate.high, 1.0)
    if not all(_is_number(one, Real) for one in ends) or list(ends) != sorted(ends):
        raise ValueError("an estimate is a number from 0 to 1 inside its interval")
    return estimate


def _is_number(value: Any, kind: type) -> bool:
    given = isinstance(value, kind) and not isinstance(value, bool)
    return given and math.isfinite(value)
