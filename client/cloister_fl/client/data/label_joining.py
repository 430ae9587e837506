"""Join of a labels file to the images: which row speaks for which, and all that does not fit.

An image takes the row that names it most exactly. Messages name lines and pseudonyms, never a key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.label_mismatches import mismatches
from cloister_fl.client.data.labels import Key, Label, Labels, alternatives, invalid_rows
from cloister_fl.client.data.tables.csv_file import SHOWN, Faults, lines
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.folder import command_at
from cloister_fl.client.site.label_settings import KEY_COLUMNS, composed
from cloister_fl.errors import DataError, LabelMissing, LabelWithoutImage
from cloister_fl.system.text import counted, listed


@dataclass(frozen=True)
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
            *(("PatientID", composed(number)) for number in numbers),
        )


def join(
    labels: Labels, images: Sequence[Linked], root: Path | None = None, *, alone: bool = False
) -> tuple[list[Label | None], list[DataError]]:
    """Give each image its label, and list all that does not fit.

    A row may speak for several images, never for several patients; a patient has one label. A
    duplicate takes no label of its own, but a row that names it belongs to its patient.

    With ``alone`` a patient's label follows from the patient's images and the rows that name one
    of them, whoever else they name: that a row is shared is told, and changes nobody's label.

    Args:
        labels: the labels file, as read.
        images: the images to join it to.
        root: the site folder, for the commands of the remedies.
        alone: give no label to a patient whose rows disagree.

    Returns:
        The row of each image, None where there is none; and the faults found, as errors that the
        caller may raise or list.
    """
    patients_of: dict[Key, set[str]] = defaultdict(set)
    rows_of_patient: dict[str, set[Label]] = defaultdict(set)
    direct: list[Label | None] = []
    used: set[Key] = set()
    for image in images:
        keys = [key for key in image.named_by if key in labels.rows]
        used.update(keys)
        if image.later:
            keys = []
        direct.append(labels.rows[keys[0]] if keys else None)
        for key in keys:
            patients_of[key].add(image.patient)
            rows_of_patient[image.patient].add(labels.rows[key])
    shared = [key for key, patients in patients_of.items() if len(patients) > 1]
    faults: Faults = [
        (labels.rows[key].line, f"has a {key[0]} that several patients share") for key in shared
    ]
    torn = {
        patient: rows
        for patient, rows in rows_of_patient.items()
        if len({row.value for row in rows}) > 1
    }
    conflicts = sorted(sorted(row.line for row in rows) for rows in torn.values())
    errors: list[DataError] = []
    if faults or conflicts:
        remedy = "Correct these lines: a patient has one class, and a row names one patient."
        told = [f"{lines(found)} give one patient two classes." for found in conflicts]
        named = {labels.rows[key].line: key[0] for key in patients_of}
        concerned = {line for line, _ in faults}.union(*conflicts)
        owners = set(torn).union(*(patients_of[key] for key in shared))
        errors.append(
            invalid_rows(faults, remedy, told, [(line, named[line]) for line in concerned]).about(
                _ids(image for image in images if image.patient in owners),
                [(line, named[line]) for line in concerned],
            )
        )
    inherited = _from_duplicates(images, direct)
    found = [
        label if label is not None else inherited.get(image.patient)
        for image, label in zip(images, direct, strict=True)
    ]
    errors += _unmatched(labels, images, found, used, root)
    if alone:
        found = [
            None if image.patient in torn else label
            for image, label in zip(images, found, strict=True)
        ]
    return found, errors


def unmatched(labels: Labels, images: Sequence[Linked]) -> int:
    """How many rows belong to no image."""
    named = {key for image in images for key in image.named_by}
    return sum(key not in named for key in labels.rows)


def _from_duplicates(images: Sequence[Linked], direct: Sequence[Label | None]) -> dict[str, Label]:
    """Return what rows for duplicates say of their patients; the kept twin may have no row."""
    return {
        image.patient: label
        for image, label in zip(images, direct, strict=True)
        if image.duplicate and label is not None
    }


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
    told = mismatches(unused, [key for image in without for key in image.named_by])
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
