"""A hold-out: patients that belong to no site, and what a model is measured to do on them.

A model that is chosen by a figure looks better on the patients it was chosen by than it is. So the
patients are divided by a hash of their images, once and for every run alike: by one part the best
model and its operating point are chosen, and only the other part is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from cloister_fl.tasks.task import Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloister_fl.metrics.figures import Metrics
    from cloister_fl.tasks.task import Floats, Integers

    Scoring: TypeAlias = Callable[[NDArray[np.float32]], Floats]
    """From a flat model, (D,), to ``Task.row`` of each unit, (U, R)."""

_LABEL = b"cloister/holdout/v1\0"


@dataclass(frozen=True)
class HoldoutUnit:
    """What has a label of its own, see ``Task.unit``: the patient, an examination or an image.

    Attributes:
        label: index into ``Task.strata``.
        images: how many were measured.
    """

    label: int
    images: int


@dataclass(frozen=True)
class HoldoutPatient:
    """A patient of the hold-out.

    Attributes:
        name: what the patient is called in a table of scores; no number of a hospital.
        label: index into ``Task.strata``, by which patients are divided.
        units: one or more; the patient alone unless the study says another.
        mark: what is hashed to divide the patients: a function of the patient's images.
        groups: by kind, such as the sex, what the patient's images say; empty where they do
            not.
    """

    name: str
    label: int
    units: tuple[HoldoutUnit, ...]
    mark: str
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """How many patients and images were measured, and how many units have each label."""

    patients: int
    images: int
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """What a model was measured to do.

    Attributes:
        reported: on the patients that are reported.
        selecting: on those by whom a model is chosen; None where the hold-out is not divided.
    """

    reported: Metrics
    selecting: Metrics | None = None


@dataclass(frozen=True)
class Holdout:
    """The patients of a hold-out, and what a model says of them.

    Attributes:
        task: what is measured.
        patients: P of them.
        score: see ``Scoring``; rows in the order of ``patients``, of each in that of its units.
        selecting: of each patient, whether it helps to choose; nobody where the hold-out is not
            divided.
    """

    task: Task
    patients: tuple[HoldoutPatient, ...]
    score: Scoring = field(repr=False)
    selecting: tuple[bool, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "selecting", division(self.patients))

    @property
    def is_divided(self) -> bool:
        """Whether a model can be chosen on other patients than those that are reported."""
        return any(self.selecting)

    @property
    def labels(self) -> Integers:
        """Of each unit, (U,)."""
        import numpy as np

        return np.array([unit.label for one in self.patients for unit in one.units], np.int64)

    @property
    def owners(self) -> Integers:
        """Index of the patient of each unit, (U,)."""
        import numpy as np

        counts = [len(one.units) for one in self.patients]
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def places(self, *, selecting: bool) -> Integers:
        """Indices of the units of a part; a patient is in one part with all of them."""
        import numpy as np

        return np.flatnonzero(np.asarray(self.selecting, bool)[self.owners] == selecting)

    def measure(self, model: NDArray[np.float32]) -> Measurement:
        """Measure a flat model, (D,), on each part."""
        rows = self.score(model)
        reported = self.measured(rows, self.places(selecting=False))
        if not self.is_divided:
            return Measurement(reported)
        return Measurement(reported, self.measured(rows, self.places(selecting=True)))

    def measured(self, rows: Floats, places: Integers) -> Metrics:
        """The figures of some units, from the rows of all; intervals go by patient."""
        labels, owners, seen = self.labels[places], self.owners[places], rows[places]
        if self.task.unit == "patient":
            found = self.task.measure(labels, seen)
        else:
            found = self.task.measure_units(labels, seen, owners)
        return replace(found, images=self._images(places))

    def _images(self, places: Integers) -> int:
        every = [unit.images for one in self.patients for unit in one.units]
        return sum(every[place] for place in places)

    def part(self, *, selecting: bool) -> Part:
        """How many patients a part has."""
        import numpy as np

        places = self.places(selecting=selecting)
        counts = np.bincount(self.labels[places], minlength=len(self.task.strata))
        patients = len(np.unique(self.owners[places]))
        return Part(patients, self._images(places), tuple(int(count) for count in counts))


def division(patients: Sequence[HoldoutPatient]) -> tuple[bool, ...]:
    """Which patients help to choose: half of each label, rounded down, by the hash of the mark.

    Nobody where a label has a single patient: a part without a class has no figure.
    """
    chosen: set[int] = set()
    for label in {one.label for one in patients}:
        same = [place for place, one in enumerate(patients) if one.label == label]
        if len(same) < 2:
            return (False,) * len(patients)
        same.sort(key=lambda place: hashlib.sha256(_LABEL + patients[place].mark.encode()).digest())
        chosen.update(same[: len(same) // 2])
    return tuple(place in chosen for place in range(len(patients)))
