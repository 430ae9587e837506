"""Labels file of a site: a CSV kept by a person, checked and joined to the images.

Rows are keyed by SOPInstanceUID, else AccessionNumber, else PatientID: the first of these columns
that the file has. Faults name lines, never values, for a key is a patient's. Of the first line no
cell is repeated, for it may be a patient's row: messages say how many columns it has, and which of
them are called almost as they must be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.csv_file import (
    SHOWN,
    Faults,
    bare,
    described,
    first_line,
    header_of,
    lines,
    lines_apart,
    listing,
    read_text,
    rows_of,
)
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.folder import command_at
from cloister_fl.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage
from cloister_fl.system.text import counted, listed
from cloister_fl.tasks import LabelsFile, Task

KEY_COLUMNS = ("SOPInstanceUID", "AccessionNumber", "PatientID")
_NAMED = "labels file", "data.labels", LabelsInvalid


@dataclass(frozen=True)
class Label:
    """One row of the file.

    Attributes:
        line: 1-based.
        value: the record that it holds, see ``Task``.
        cells: what the record was read from.
    """

    line: int
    value: Hashable
    cells: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Labels:
    """A labels file without faults of its own.

    Attributes:
        column: the key column, one of ``KEY_COLUMNS``.
        rows: from key to label, in the order of the file; a PatientID as ``read_labels`` was told
            to read it.
    """

    column: str
    rows: dict[str, Label] = field(repr=False)


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
    """

    keys: Keys
    patient: str
    duplicate: bool = False
    later: bool = False
    numbers: tuple[str, ...] = field(default=(), repr=False)

    def named_by(self, column: str) -> tuple[str, ...]:
        """The keys of rows that may speak for the image."""
        match column:
            case "SOPInstanceUID":
                return (self.keys.sop_instance,)
            case "AccessionNumber":
                return (self.keys.accession,)
            case _:
                return self.numbers or (self.keys.patient_id,)


def read_labels(path: Path, task: Task, number: Callable[[str], str] = str) -> Labels:
    """Read and judge the labels file of a task that has one.

    Args:
        path: the file.
        task: what its rows are read by.
        number: in which form a PatientID is compared; see ``patients.units``.

    Raises:
        LabelsInvalid: with every faulty line.
    """
    faults: Faults = []
    labels = _parsed(read_text(path, *_NAMED), task, number, faults)
    if faults:
        raise _invalid(faults, task.allowed)
    return labels


def sound_labels(path: Path, task: Task, number: Callable[[str], str] = str) -> Labels:
    """Read what can be used of a labels file: a row with a fault counts as absent, alone.

    A run with privacy reads labels so, where nobody froze the data: what one patient's row says
    has no bearing on another's. So each line is a row, whatever quotation marks it lacks, and no
    row makes the file too large. Of rows with one key none counts.

    Args:
        path, task, number: as ``read_labels``.

    Raises:
        LabelsInvalid: the file cannot be read, or its first line does not say what is in it.
    """
    first = first_line(path, *_NAMED)
    return _parsed(first, task, number, None, lambda mark: lines_apart(path, mark, *_NAMED))


def _parsed(
    text: str,
    task: Task,
    number: Callable[[str], str],
    faults: Faults | None,
    apart: Callable[[str], Iterator[tuple[int, list[str]]]] | None = None,
) -> Labels:
    """Read the rows of a text, or of ``apart``, which gets what separates cells; those with a fault
    are left out, and listed where ``faults`` is given."""
    faults = [] if faults is None else faults
    wanted = task.source.columns if isinstance(task.source, LabelsFile) else ()
    header, delimiter = header_of(text, wanted, KEY_COLUMNS)
    column = next((name for name in KEY_COLUMNS if name in header), None)
    if column is None or any(header.count(name) != 1 for name in (column, *wanted)):
        raise _header_invalid(header, column, wanted, task)
    at_key, at_values = header.index(column), [header.index(name) for name in wanted]
    rows: dict[str, Label] = {}
    twice: set[str] = set()
    for line, cells in apart(delimiter) if apart else rows_of(text, delimiter, faults):
        if line == 1 or not any(cells):
            continue
        if len(cells) != len(header):
            faults.append((line, "has another number of cells than the first line"))
        elif not cells[at_key]:
            faults.append((line, f"has no {column}"))
        elif empty := [header[place] for place in at_values if not cells[place]]:
            faults.append((line, f"has no {empty[0]}"))
        elif (key := number(cells[at_key]) if column == "PatientID" else cells[at_key]) in rows:
            first = rows[key].line
            faults.append((line, f"has the same {column} as line {first}"))
            twice.add(key)
        else:
            values = [cells[place] for place in at_values]
            try:
                record = task.record(values)
            except ValueError as error:
                faults.append((line, str(error)))
            else:
                rows[key] = Label(line, record, tuple(values))
    return Labels(column, {key: row for key, row in rows.items() if key not in twice})


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
    patients_of: dict[str, set[str]] = defaultdict(set)
    rows_of_patient: dict[str, set[Label]] = defaultdict(set)
    direct: list[Label | None] = []
    used: set[str] = set()
    for image in images:
        keys = [key for key in image.named_by(labels.column) if key in labels.rows]
        used.update(keys)
        if image.later:
            keys = []
        direct.append(labels.rows[keys[0]] if keys else None)
        for key in keys:
            patients_of[key].add(image.patient)
            rows_of_patient[image.patient].add(labels.rows[key])
    faults: Faults = [
        (labels.rows[key].line, f"has a {labels.column} that several patients share")
        for key, patients in patients_of.items()
        if len(patients) > 1
    ]
    conflicts = sorted(
        sorted(row.line for row in rows)
        for rows in rows_of_patient.values()
        if len({row.value for row in rows}) > 1
    )
    errors: list[DataError] = []
    if faults or conflicts:
        remedy = "Correct these lines: a patient has one class, and a row names one patient."
        errors.append(_invalid(faults, remedy, conflicts))
    inherited = _from_duplicates(images, direct)
    found = [
        label if label is not None else inherited.get(image.patient)
        for image, label in zip(images, direct, strict=True)
    ]
    errors += _unmatched(labels, images, found, used, root)
    if alone:
        torn = {
            one for one, rows in rows_of_patient.items() if len({row.value for row in rows}) > 1
        }
        found = [
            None if image.patient in torn else label
            for image, label in zip(images, found, strict=True)
        ]
    return found, errors


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
    used: set[str],
    root: Path | None,
) -> Iterator[DataError]:
    missing = [
        image.patient[:12]
        for image, label in zip(images, found, strict=True)
        if label is None and not image.duplicate
    ]
    if missing:
        yield LabelMissing(
            f"{counted(len(missing), 'image has', 'images have')} no label.",
            why=f"Ids of their patients: {listed(missing, SHOWN)}.",
            remedy=f"Add a row for each {labels.column}, or remove the images from the folder. Who "
            f"the patients are: {command_at(root, f'find {missing[0]} --study STUDY')}",
        )
    unused = [str(label.line) for key, label in labels.rows.items() if key not in used]
    if unused:
        yield LabelWithoutImage(
            f"{counted(len(unused), 'label belongs', 'labels belong')} to no image.",
            why=f"Lines of the labels file: {listed(unused, SHOWN)}.",
            remedy="Add the images, or remove the rows. A rejected image counts as missing; which "
            f"are rejected, and why: {command_at(root, 'check --offline')}",
        )


def _header_invalid(
    header: Sequence[str], key: str | None, columns: Sequence[str], task: Task
) -> LabelsInvalid:
    # The first that is not there once; the key column is judged before it.
    wanted = next((name for name in columns if header.count(name) != 1), columns[0])
    if key is None:
        names = ", ".join(f"'{name}'" for name in KEY_COLUMNS[:-1])
        what = f"has no column {names} or '{KEY_COLUMNS[-1]}'"
    elif header.count(key) > 1:
        what = f"has the column '{key}' {header.count(key)} times"
    elif wanted in header:
        what = f"has the column '{wanted}' {header.count(wanted)} times"
    else:
        what = f"has no column '{wanted}'"
    return LabelsInvalid(
        f"The labels file {what}.",
        why=described(header, _shown(columns, task)),
        remedy=f"In its first line, name one column {', '.join(KEY_COLUMNS[:-1])} or "
        f"{KEY_COLUMNS[-1]}, and one '{wanted}'; spelling and case must match.",
    )


def _shown(columns: Sequence[str], task: Task) -> list[str]:
    """Names of columns that a message may repeat.

    Those that the study and Cloister give, and none that is also a class: a patient's row may
    hold one.
    """
    classes = {bare(name) for name in task.strata}
    return [name for name in (*KEY_COLUMNS, *columns) if bare(name) not in classes]


def _invalid(faults: Faults, remedy: str, conflicts: Sequence[Sequence[int]] = ()) -> LabelsInvalid:
    """Return the error that lists faults of lines, and lines that give one patient two classes."""
    told = [f"{lines(found)} give one patient two classes." for found in conflicts]
    return LabelsInvalid(f"The labels file has {listing(faults, told)}", remedy=remedy)
