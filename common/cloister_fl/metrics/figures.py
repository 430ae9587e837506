"""What a model was measured to do: figures with their intervals, and on how many patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloister_fl.metrics.curves import CURVE_FIGURES

_TITLES: Mapping[str, str] = {"balanced_accuracy": "balanced accuracy", "dice": "Dice"}


def of_classes() -> tuple[str, ...]:
    """Names of the figures of a classification, in the order in which they are told."""
    return (*CURVE_FIGURES, "balanced_accuracy")


def title_of(name: str) -> str:
    """What people call a figure, as in the middle of a sentence."""
    curve = CURVE_FIGURES.get(name)
    return _TITLES[name] if curve is None else curve.title


class MetricsInputInvalid(ValueError):
    """Labels, probabilities or counts do not have the form that is asked for."""


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
        class_counts: patients of each label, in the order of the task's ``strata``.
    """

    figures: Mapping[str, Estimate | None]
    patients: int
    class_counts: tuple[int, ...]

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
            "class_counts": list(self.class_counts),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Metrics:
        """Read what ``to_json`` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        rest = {"patients", "class_counts"}
        return cls(
            {name: one and Estimate(**one) for name, one in told.items() if name not in rest},
            int(told["patients"]),
            tuple(int(count) for count in told["class_counts"]),
        )
