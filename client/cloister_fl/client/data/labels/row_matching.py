"""Join of a labels file to the images: which row speaks for which, and all that does not fit.

An image takes the row that names it most exactly. What has a label of its own, the unit, has one:
rows that name it, or a part of it, must agree with each other and with what its images take; a row
that names more than the unit speaks for an image that no other row names. Messages name lines and
pseudonyms, never a key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.labels.label_file import Key, Label, Labels, alternatives, invalid_rows
from cloister_fl.client.data.labels.labelled_units import (
    BREADTH,
    BREADTH_OF_UNIT,
    UnitKey,
    unit_of,
)
from cloister_fl.client.data.labels.mismatches import mismatches
from cloister_fl.client.data.tables.csv_file import SHOWN, Faults, lines
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.folder import command_at
from cloister_fl.client.site.label_settings import KEY_COLUMNS, composed
from cloister_fl.errors import DataError, LabelMissing, LabelsAmbiguous, LabelWithoutImage
from cloister_fl.system.text import counted, listed
from cloister_fl.tasks import Unit


@dataclass(frozen=True, slots=True)
class Linked:
    """An image as the join sees it.

    Attributes:
        keys: what its header says.
        patient: the patient's pseudonym.
        duplicate: whether the image itself was turned away as a duplicate, or came later.
        later: whether what the labels say of it is left aside: it came after a study was frozen.
        numbers: by which a row with a PatientID may name the patient, the image's own first; empty
            for the PatientID as it stands.
        name: the image's pseudonym, see ``frozen_dataset.image_name``.
    """

    keys: Keys
    patient: str
    duplicate: bool = False
    later: bool = False
    numbers: tuple[str, ...] = field(default=(), repr=False)
    name: str = ""

    @property
    def ids(self) -> tuple[str, str]:
        """What messages call the image and its patient."""
        return self.name[:12], self.patient[:12]

    @property
    def named_by(self) -> tuple[Key, ...]:
        """The keys of rows that may speak for the image, the most exact first."""
        numbers = self.numbers or (self.keys.patient_id,)
        return (
            ("SOPInstanceUID", composed(self.keys.sop_instance)),
            ("AccessionNumber", composed(self.keys.accession)),
            ("StudyInstanceUID", composed(self.keys.study_instance)),
            *(("PatientID", composed(number)) for number in numbers),
        )

    @property
    def as_written(self) -> tuple[Key, ...]:
        """The keys as the header has them: what a person who mends the file compares."""
        return *self.named_by[:3], ("PatientID", composed(self.keys.patient_id))


def join(
    labels: Labels,
    images: Sequence[Linked],
    root: Path | None = None,
    *,
    alone: bool = False,
    unit: Unit = "patient",
) -> tuple[list[Label | None], list[DataError]]:
    """Give each image its label, and list all that does not fit.

    A row may speak for several images, never for several patients; a unit has one label. A
    duplicate takes no label of its own, but a row that names it belongs to its unit.

    With ``alone`` a unit's label follows from its patient's images and the rows that name one of
    them, whoever else they name: that a row is shared is told, and changes nobody's label.

    Args:
        labels: the labels file, as read.
        images: the images to join it to.
        root: the site folder, for the commands of the remedies.
        alone: give no label to a unit whose rows disagree.
        unit: ``Task.unit``.

    Returns:
        The row of each image, None where there is none; and the faults found, as errors that the
        caller may raise or list.
    """
    units = [unit_of(unit, image.patient, image.keys) for image in images]
    patients_of: dict[Key, set[str]] = defaultdict(set)
    said: dict[UnitKey, set[Key]] = defaultdict(set)
    direct: list[Label | None] = []
    used: set[Key] = set()
    for image, own in zip(images, units, strict=True):
        keys = [key for key in image.named_by if key in labels.rows]
        used.update(keys)
        if image.later:
            keys = []
        direct.append(labels.rows[keys[0]] if keys else None)
        for key in keys:
            patients_of[key].add(image.patient)
        said[own].update(_binding(keys, unit))
    torn = {
        own: keys for own, keys in said.items() if len({labels.rows[key].value for key in keys}) > 1
    }
    errors = list(_contradictions(labels, images, units, patients_of, torn, unit))
    inherited = {
        own: label
        for image, own, label in zip(images, units, direct, strict=True)
        if image.duplicate and label is not None
    }
    # What rows for duplicates say; the twin that was kept may have no row.
    found = [
        label if label is not None else inherited.get(own)
        for own, label in zip(units, direct, strict=True)
    ]
    errors += _unmatched(labels, images, found, used, root)
    if alone:
        found = [None if own in torn else label for own, label in zip(units, found, strict=True)]
    return found, errors


def _binding(keys: Sequence[Key], unit: Unit) -> Iterator[Key]:
    """Of the rows that name an image, those that have a say in its unit's label: of the unit and
    of its parts; else of the least that is named."""
    least = min((BREADTH[column] for column, _ in keys), default=0)
    most = max(least, BREADTH_OF_UNIT[unit])
    return (key for key in keys if BREADTH[key[0]] <= most)


def _contradictions(
    labels: Labels,
    images: Sequence[Linked],
    units: Sequence[UnitKey],
    patients_of: Mapping[Key, Collection[str]],
    torn: Mapping[UnitKey, Collection[Key]],
    unit: Unit,
) -> Iterator[DataError]:
    """Rows that several patients share, and units that have two labels."""
    shared = [key for key, patients in patients_of.items() if len(patients) > 1]
    faults: Faults = [
        (labels.rows[key].line, f"has a {key[0]} that several patients share") for key in shared
    ]
    sharing = {patient for key in shared for patient in patients_of[key]}
    of_patients = unit == "patient" and bool(torn)
    told = _told(labels, torn, "patient", "classes") if of_patients else []
    if faults or told:
        remedy = "Correct these lines: a patient has one class, and a row names one patient."
        concerned = {*shared, *(key for keys in torn.values() for key in keys if of_patients)}
        yield invalid_rows(faults, remedy, told).about(
            _ids(
                image
                for image, own in zip(images, units, strict=True)
                if image.patient in sharing or (of_patients and own in torn)
            ),
            _rows(labels, concerned),
        )
    if torn and not of_patients:
        concerned_images = [image for image, own in zip(images, units, strict=True) if own in torn]
        lines_told = "".join(f"\n  {one}" for one in _told(labels, torn, unit, "labels")[:SHOWN])
        more = f"\n  and {len(torn) - SHOWN} more." if len(torn) > SHOWN else ""
        names = listed((image.ids[0] for image in concerned_images), SHOWN)
        yield LabelsAmbiguous(
            f"{counted(len(torn), f'{unit} has', f'{unit}s have')} two labels:{lines_told}{more}\n",
            why=f"Ids of their images: {names}.",
            remedy=f"Correct these lines: rows that name one {unit}, or a part of it, agree.",
        ).about(
            _ids(concerned_images),
            _rows(labels, {key for keys in torn.values() for key in keys}),
        )


def _told(
    labels: Labels, torn: Mapping[UnitKey, Collection[Key]], unit: Unit, what: str
) -> list[str]:
    conflicts = sorted(sorted(labels.rows[key].line for key in keys) for keys in torn.values())
    return [f"{lines(found)} give one {unit} two {what}." for found in conflicts]


def _rows(labels: Labels, keys: Iterable[Key]) -> Iterator[tuple[int, str]]:
    return ((labels.rows[key].line, key[0]) for key in keys)


def unmatched(labels: Labels, images: Sequence[Linked]) -> int:
    """How many rows belong to no image."""
    named = {key for image in images for key in image.named_by}
    return sum(key not in named for key in labels.rows)


def _unmatched(
    labels: Labels,
    images: Sequence[Linked],
    found: Sequence[Label | None],
    used: set[Key],
    root: Path | None,
) -> Iterator[DataError]:
    without = [
        image
        for image, label in zip(images, found, strict=True)
        if label is None and not image.duplicate
    ]
    unused = {key: label for key, label in labels.rows.items() if key not in used}
    written = {(column, label.key or key): label for (column, key), label in unused.items()}
    told = mismatches(written, [key for image in without for key in image.as_written])
    if without:
        missing = [image.patient[:12] for image in without]
        columns = alternatives(sorted({column for column, _ in labels.rows}, key=KEY_COLUMNS.index))
        yield LabelMissing(
            f"{counted(len(missing), 'image has', 'images have')} no label.",
            why=" ".join([f"Ids of their patients: {listed(missing, SHOWN)}.", *told]),
            remedy=f"Add a row for each {columns or KEY_COLUMNS[-1]}, or remove the images from "
            f"the folder. Who the patients are: "
            f"{command_at(root, f'find {missing[0]} --study STUDY')}",
        ).about(_ids(without))
    if unused:
        at = [str(label.line) for label in unused.values()]
        yield LabelWithoutImage(
            f"{counted(len(unused), 'label belongs', 'labels belong')} to no image.",
            why=" ".join([f"Lines of the labels file: {listed(at, SHOWN)}.", *told]),
            remedy="Add the images, or remove the rows. A rejected image counts as missing; which "
            f"are rejected, and why: {command_at(root, 'check --offline')}",
        ).about(rows=[(label.line, column) for (column, _), label in unused.items()])


def _ids(images: Iterable[Linked]) -> list[tuple[str, str]]:
    return [image.ids for image in images]
