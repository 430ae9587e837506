"""What the delivered model says of a hold-out, beyond the figures: for report, JSON and table.

Nothing here is measured on the patients who chose the model, but the operating point: that is
chosen by them, and what comes of it is told of the others.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from cloister_fl.metrics.classification import measure
from cloister_fl.metrics.details import (
    CalibrationBin,
    Calls,
    Point,
    best_threshold,
    calibration,
    calls,
    curve,
)
from cloister_fl.metrics.figures import Metrics
from cloister_fl.model_file import OperatingPoint
from cloister_fl.system.text import as_cell
from cloister_fl.tasks.divided_holdout import Holdout, Part

if TYPE_CHECKING:
    from cloister_fl.tasks.task import Floats

UNKNOWN = "not told"
"""Of a patient whose images are silent on a group."""


@dataclass(frozen=True)
class OfClass:
    """A class against the rest.

    Attributes:
        name: of the class.
        metrics: AUROC and average precision of this class alone.
        curve: points of the ROC and the precision-recall curve.
        calibration: bins of equally many units.
    """

    name: str
    metrics: Metrics
    curve: tuple[Point, ...]
    calibration: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class Group:
    """The patients whose images say the same of them.

    Attributes:
        kind: age, maker or sex.
        name: which of its kind.
        metrics: of the patients of the group.
    """

    kind: str
    name: str
    metrics: Metrics


@dataclass(frozen=True)
class Details:
    """What is known of a model by a hold-out.

    Attributes:
        reported, selecting: how many patients are in each part; the second is None where the
            hold-out is not divided.
        operating_point: chosen by the selecting part; None without one, and for other tasks than
            two classes.
        calls: what comes of it on the reported part, by unit; at 0.5 without an operating point;
            None for other tasks than two classes.
        confusion: of more than two classes, by class the units that were called each class, the
            most probable one; else empty.
        classes: each class, or of two the second; none for other tasks and where a class has no
            unit.
        groups: of the reported patients, by age, maker and sex as far as the images tell.
    """

    reported: Part
    selecting: Part | None
    operating_point: OperatingPoint | None
    calls: Calls | None
    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[OfClass, ...]
    groups: tuple[Group, ...]

    def to_json(self) -> dict[str, object]:
        """Ready for ``json.dumps``; the keys are stable."""
        told = asdict(self)
        told["classes"] = [
            {
                "name": one.name,
                "metrics": one.metrics.to_json(),
                "curve": [asdict(point) for point in one.curve],
                "calibration": [asdict(each) for each in one.calibration],
            }
            for one in self.classes
        ]
        told["groups"] = [{**vars(one), "metrics": one.metrics.to_json()} for one in self.groups]
        return told


def describe(holdout: Holdout, rows: Floats) -> Details:
    """Describe a model by what it says of a hold-out, ``Holdout.score``, (P, R)."""
    places = holdout.places(selecting=False)
    labels, scores = holdout.labels[places], rows[places]
    owners = None if holdout.task.unit == "patient" else holdout.owners[places]
    names = holdout.task.strata if holdout.task.columns else ()
    point = _operating_point(holdout, rows) if len(names) == 2 else None
    called = None
    confusion: tuple[tuple[int, ...], ...] = ()
    if len(names) == 2:
        threshold = 0.5 if point is None else point.threshold
        called = calls(labels == 1, scores[:, 1], threshold, owners)
    elif names:
        most = scores.argmax(axis=1)
        table = np.zeros((len(names), len(names)), np.int64)
        np.add.at(table, (labels, most), 1)
        confusion = tuple(tuple(int(count) for count in row) for row in table)
    counted = np.bincount(labels, minlength=len(names)) if names else np.zeros(1)
    chosen = (1,) if len(names) == 2 else range(len(names))
    classes = []
    for place in chosen if counted.all() else ():
        is_class, score = labels == place, scores[:, place]
        both = np.stack([1 - score, score], axis=1)
        of_one = measure(is_class.astype(np.int64), both, owners)
        shapes = curve(is_class, score), calibration(is_class, score, owners)
        classes.append(OfClass(names[place], of_one, *shapes))
    return Details(
        reported=holdout.part(selecting=False),
        selecting=holdout.part(selecting=True) if holdout.is_divided else None,
        operating_point=point,
        calls=called,
        confusion=confusion,
        classes=tuple(classes),
        groups=_groups(holdout, rows),
    )


def _operating_point(holdout: Holdout, rows: Floats) -> OperatingPoint | None:
    if not holdout.is_divided:
        return None
    places = holdout.places(selecting=True)
    threshold = best_threshold(holdout.labels[places] == 1, rows[places, 1])
    chose = holdout.part(selecting=True).patients
    return OperatingPoint(holdout.task.strata[1], threshold, chose)


def _groups(holdout: Holdout, rows: Floats) -> tuple[Group, ...]:
    places = holdout.places(selecting=False)
    groups = [holdout.patients[owner].groups for owner in holdout.owners[places]]
    found = []
    for kind in sorted({kind for each in groups for kind in each}):
        said = [each.get(kind) or UNKNOWN for each in groups]
        for name in sorted(set(said), key=lambda one: (one == UNKNOWN, one)):
            of_group = places[[one == name for one in said]]
            found.append(Group(kind, name, holdout.measured(rows, of_group)))
    return tuple(found)


def scores_table(holdout: Holdout, rows: Floats) -> bytes:
    """The model's scores as CSV, UTF-8: a row for each unit of who reports and who chooses."""
    task = holdout.task
    kinds = sorted({kind for one in holdout.patients for kind in one.groups})
    columns = task.columns or task.figures
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["patient", "part", "label", *columns, "images", *kinds])
    units = [unit for one in holdout.patients for unit in one.units]
    for owner, unit, row in zip(holdout.owners, units, rows, strict=True):
        one = holdout.patients[owner]
        said = [as_cell(one.groups.get(kind, "")) for kind in kinds]
        part = "selecting" if holdout.selecting[owner] else "reported"
        label = as_cell(task.strata[unit.label])
        writer.writerow([one.name, part, label, *map(float, row), unit.images, *said])
    return text.getvalue().encode()
