"""Training targets of a site's images, from where the study's task finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, assert_never

from cloister_fl.client.data.labels.label_file import (
    Label,
    Labels,
    read_labels,
    sound_labels,
    tolerant_labels,
)
from cloister_fl.client.data.labels.labelled_units import UnitKey, unit_of
from cloister_fl.client.data.labels.row_matching import Linked, join, unmatched
from cloister_fl.client.data.mask_matching import Join
from cloister_fl.client.data.sealed_labels import Cells
from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import DataError, LabelsInvalid
from cloister_fl.study.schema import Study
from cloister_fl.tasks import LabelsFile, Segmentations, Task, Unit

UNLABELLED = -1
"""Label of a patient that was read with ``require_labels=False``."""

_Value = TypeVar("_Value")
Named = tuple[Accepted, str]
"""An image and its patient's pseudonym."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a reading.

    Attributes:
        records: by image, see ``Task``; None where there is none.
        faults: what does not fit.
        cells: by image, the cells of the labels file that its record was read from; None where
            there is none. Empty where there is no labels file.
        rows_left: see ``loading.Reading``.
    """

    records: Sequence[Any]
    faults: tuple[DataError, ...] = ()
    cells: Sequence[Cells | None] = ()
    rows_left: int = 0

    def tokens(
        self, task: Task, images: Sequence[Named], slices: Sequence[Named]
    ) -> list[str | None]:
        """What a manifest keeps of each slice: ``Task.token`` of its record; a slice of a volume
        has its unit's."""
        found = _by_slice(self.records, task.unit, images, slices)
        return [None if record is None else task.token(record) for record in found]

    def cells_of(
        self, task: Task, images: Sequence[Named], slices: Sequence[Named]
    ) -> list[Cells | None]:
        """The cells of each slice; a slice of a volume has its unit's."""
        return _by_slice(self.cells or [None] * len(images), task.unit, images, slices)

    def label(self, task: Task, places: Sequence[int]) -> int:
        """The label of the unit, or the patient, whose images are at ``places``."""
        known = [self.records[place] for place in places if self.records[place] is not None]
        return task.label(known) if known else UNLABELLED


def _by_slice(
    values: Sequence[_Value | None], unit: Unit, images: Sequence[Named], slices: Sequence[Named]
) -> list[_Value | None]:
    own: dict[tuple[str, str], _Value | None] = {}
    of_unit: dict[UnitKey, _Value | None] = {}
    for (one, name), value in zip(images, values, strict=True):
        own[name, one.keys.sop_instance] = value
        of_unit[unit_of(unit, name, one.keys)] = value
    return [
        own[name, one.keys.sop_instance]
        if (name, one.keys.sop_instance) in own
        # A slice whose header says another examination than its volume's first has none.
        else of_unit.get(unit_of(unit, name, one.keys))
        for one, name in slices
    ]


def unlabelled(images: Sequence[Named]) -> Targets:
    """The targets of a reading that is not about them."""
    return Targets([None] * len(images))


def join_targets(
    site: Site,
    study: Study,
    images: Sequence[Named],
    linked: Sequence[Linked],
    joined: Join | None,
    number: Callable[[str], str] = str,
    *,
    alone: bool = False,
    tolerant: bool = False,
) -> Targets:
    """Join what the study's task asks for to the images.

    Args:
        site: whose labels file is read, where the task has one.
        study: the study.
        images: images or volumes, each with its patient.
        linked: what labels are joined to: one for each of ``images``, in its order, and between
            them one for each that was turned away as a duplicate or came later.
        joined: the masks that segmentations gave; None where there is none.
        number: see ``read_labels``.
        alone: let a fault in the labels file cost the patient that it is about, and nobody else.
        tolerant: see ``loading.read_cohort``.
    """
    source = study.task.source
    match source:
        case Segmentations():
            joined = joined or Join(images, linked)
            return Targets(joined.masks, tuple(joined.faults(site.root)) if images else ())
        case LabelsFile():
            rows_left = 0
            if tolerant:
                found, faults, rows_left = _tolerated(site, study.task, linked, number)
            else:
                found, faults = _labels(site, study.task, linked, number, alone=alone)
            # Where no image could be used, that labels have no image is no news; a bad file is.
            faults = [one for one in faults if images or isinstance(one, LabelsInvalid)]
            kept = [label for label, one in zip(found, linked, strict=True) if not one.duplicate]
            return Targets(
                [None if label is None else label.value for label in kept],
                tuple(faults),
                [None if label is None else label.cells for label in kept],
                rows_left,
            )
        case _:
            assert_never(source)


def frozen_targets(
    task: Task, names: Sequence[tuple[str, str]], cells: Mapping[tuple[str, str], Cells]
) -> Targets:
    """The targets that images were frozen with, whatever the labels file says now.

    Args:
        task: the study's; one that has a labels file.
        names: pseudonyms of each image, or of a slice of each volume, and of its patient.
        cells: by pseudonyms; see ``frozen_dataset.labels_of``.
    """
    found = [cells.get(name) for name in names]
    return Targets([None if one is None else task.record(one) for one in found], cells=found)


def faults_alone(site: Site, task: Task) -> list[DataError]:
    """What is wrong with the targets by themselves, where no image can be read."""
    match task.source:
        case Segmentations():
            return []
        case LabelsFile():
            try:
                read_labels(site.labels, task, settings=site.label_settings)
            except LabelsInvalid as error:
                return [error]
            return []


def _tolerated(
    site: Site, task: Task, linked: Sequence[Linked], number: Callable[[str], str]
) -> tuple[list[Label | None], list[DataError], int]:
    """The labels that fit, what does not, and how many rows those are."""
    try:
        labels, faulty, told = tolerant_labels(site.labels, task, number, site.label_settings)
    except DataError as error:
        return [None] * len(linked), [error], 0
    found, more = join(labels, linked, site.root, alone=True, unit=task.unit)
    return found, [*told, *more], faulty + unmatched(labels, linked)


def _labels(
    site: Site,
    task: Task,
    linked: Sequence[Linked],
    number: Callable[[str], str],
    *,
    alone: bool,
) -> tuple[list[Label | None], list[DataError]]:
    faults: list[DataError] = []
    labels: Labels | None = None
    try:
        labels = read_labels(site.labels, task, number, site.label_settings)
    except DataError as error:
        faults.append(error)
    if alone:
        # Also where the whole of it can be read: a row that swallowed another is no fault of CSV.
        with suppress(DataError):
            labels = sound_labels(site.labels, task, number, site.label_settings)
    if labels is None:
        return [None] * len(linked), faults
    found, more = join(labels, linked, site.root, alone=alone, unit=task.unit)
    return found, [*faults, *more]
