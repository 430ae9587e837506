"""Labels file of a site: a CSV kept by a person, checked and joined to the images.

A row is keyed by its SOPInstanceUID, else its AccessionNumber, else its PatientID: the first of
these that it has, whatever other rows have. An image takes the row that names it most exactly.
Faults name lines, never values, for a key is a patient's. Of the first line no cell is repeated,
for it may be a patient's row: messages say how many columns it has, and which of them are called
almost as they must be.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.label_mismatches import mismatches
from cloister_fl.client.data.tables.csv_file import (
    SHOWN,
    Faults,
    Header,
    bare,
    described,
    first_lines,
    header_of,
    lines,
    lines_apart,
    listing,
    read_text,
    rows_of,
)
from cloister_fl.client.data.tables.spreadsheet import is_spreadsheet, rows_of_sheet
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.folder import command_at
from cloister_fl.client.site.label_settings import KEY_COLUMNS, LabelSettings, composed
from cloister_fl.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage
from cloister_fl.system.text import counted, listed
from cloister_fl.tasks import LabelsFile, Task

_NAMED = "labels file", "data.labels", LabelsInvalid
Key = tuple[str, str]
"""A key column and what stands in it."""

_PLAIN = LabelSettings()
_ENCODINGS = (
    'Save it as UTF-8, or say below [data.labels] in site.toml what it is: encoding = "cp1252" is '
    "what programs of Windows write."
)


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
        rows: from key column and key to label, in the order of the file; a PatientID as
            ``read_labels`` was told to read it.
    """

    rows: dict[Key, Label] = field(repr=False)


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

    @property
    def named_by(self) -> tuple[Key, ...]:
        """The keys of rows that may speak for the image, the most exact first."""
        numbers = self.numbers or (self.keys.patient_id,)
        return (
            ("SOPInstanceUID", composed(self.keys.sop_instance)),
            ("AccessionNumber", composed(self.keys.accession)),
            *(("PatientID", composed(number)) for number in numbers),
        )


def read_labels(
    path: Path,
    task: Task,
    number: Callable[[str], str] = str,
    settings: LabelSettings = _PLAIN,
) -> Labels:
    """Read and judge the labels file of a task that has one.

    Args:
        path: the file.
        task: what its rows are read by.
        number: in which form a PatientID is compared; see ``patients.units``.
        settings: what the file calls columns and values.

    Raises:
        LabelsInvalid: with every faulty line.
    """
    faults: Faults = []
    labels = _read(path, task, number, settings, faults)
    if faults:
        raise _invalid(faults, task.allowed)
    return labels


def tolerant_labels(
    path: Path, task: Task, number: Callable[[str], str], settings: LabelSettings
) -> tuple[Labels, int, list[DataError]]:
    """The rows without a fault of their own, how many have one, and what; for a person to see.

    Args and raises as ``read_labels``, of what is no fault of single rows.
    """
    faults: Faults = []
    labels = _read(path, task, number, settings, faults)
    return labels, len(faults), [_invalid(faults, task.allowed)] if faults else []


def _read(
    path: Path,
    task: Task,
    number: Callable[[str], str],
    settings: LabelSettings,
    faults: Faults,
) -> Labels:
    if is_spreadsheet(path):
        table = rows_of_sheet(path, settings.sheet, *_NAMED)
        line, cells = next((row for row in table if any(row[1])), (1, [""]))
        found = Header([settings.ours(cell) for cell in cells], "", line)
        return _parsed(found, table, task, number, settings, faults)
    text = read_text(path, *_NAMED, encoding=settings.encoding, remedy=_ENCODINGS)
    found = header_of(text, _wanted(task), KEY_COLUMNS, settings.ours)
    rows = rows_of(text, found.delimiter, faults)
    return _parsed(found, rows, task, number, settings, faults)


def sound_labels(
    path: Path,
    task: Task,
    number: Callable[[str], str] = str,
    settings: LabelSettings = _PLAIN,
) -> Labels:
    """Read what can be used of a labels file: a row with a fault counts as absent, alone.

    A run with privacy reads labels so, where nobody froze the data: what one patient's row says
    has no bearing on another's. So each line is a row, whatever quotation marks it lacks, and no
    row makes the file too large. Of rows with one key none counts.

    Args:
        path, task, number, settings: as ``read_labels``.

    Raises:
        LabelsInvalid: the file cannot be read, or its first line does not say what is in it, or it
            is UTF-16 or a workbook: there a byte of one row turns others into something else.
    """
    encoding = settings.encoding
    if encoding == "utf-16" or is_spreadsheet(path):
        kind = "a workbook" if is_spreadsheet(path) else "UTF-16 text"
        raise LabelsInvalid(
            f"The labels file is {kind}, which is read for data that are frozen alone.",
            remedy="Freeze the data (cloister client freeze), or save the file as CSV in UTF-8.",
        )
    first = first_lines(path, *_NAMED, encoding=encoding)
    found = header_of(first, _wanted(task), KEY_COLUMNS, settings.ours)
    rows = lines_apart(path, found.delimiter, *_NAMED, encoding=encoding)
    return _parsed(found, rows, task, number, settings, [])


def _wanted(task: Task) -> list[str]:
    columns = task.source.columns if isinstance(task.source, LabelsFile) else ()
    return [composed(name) for name in columns]


def _parsed(
    found: Header,
    table: Iterable[tuple[int, list[str]]],
    task: Task,
    number: Callable[[str], str],
    settings: LabelSettings,
    faults: Faults,
) -> Labels:
    """Read the rows of a table below its header; those with a fault are left out, and listed."""
    header, wanted = found.cells, _wanted(task)
    keyed = [name for name in KEY_COLUMNS if name in header]
    if not keyed or any(header.count(name) != 1 for name in (*keyed, *wanted)):
        raise _header_invalid(header, keyed, wanted, task, settings)
    at_keys = [(name, header.index(name)) for name in keyed]
    at_values = [header.index(name) for name in wanted]
    rows: dict[Key, Label] = {}
    twice: set[Key] = set()
    for line, cells in table:
        if line <= found.line or not any(cells):
            continue
        if len(cells) != len(header):
            faults.append((line, "has another number of cells than the first line"))
            continue
        # Row by row: which column is filled elsewhere is of other patients.
        column, cell = next(((n, cells[at]) for n, at in at_keys if cells[at]), ("", ""))
        key = (column, composed(number(cell)) if column == "PatientID" else cell)
        if not column:
            faults.append((line, f"has no {alternatives(keyed)}"))
        elif empty := [header[place] for place in at_values if not cells[place]]:
            faults.append((line, f"has no {empty[0]}"))
        elif key in rows:
            faults.append((line, f"has the same {column} as line {rows[key].line}"))
            twice.add(key)
        else:
            values = [settings.value(header[place], cells[place]) for place in at_values]
            try:
                record = task.record(values)
            except ValueError as error:
                faults.append((line, str(error)))
            else:
                rows[key] = Label(line, record, tuple(values))
    return Labels({key: row for key, row in rows.items() if key not in twice})


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
    faults: Faults = [
        (labels.rows[key].line, f"has a {key[0]} that several patients share")
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
        )
    if unused:
        at = [str(label.line) for label in unused.values()]
        yield LabelWithoutImage(
            f"{counted(len(unused), 'label belongs', 'labels belong')} to no image.",
            why=" ".join([f"Lines of the labels file: {listed(at, SHOWN)}.", *told]),
            remedy="Add the images, or remove the rows. A rejected image counts as missing; which "
            f"are rejected, and why: {command_at(root, 'check --offline')}",
        )


def _header_invalid(
    header: Sequence[str],
    keyed: Sequence[str],
    columns: Sequence[str],
    task: Task,
    settings: LabelSettings,
) -> LabelsInvalid:
    """Return the error that says all that is wrong with the names of the columns."""
    missing = [name for name in columns if name not in header]
    told = [
        f"has the column '{name}' {header.count(name)} times"
        for name in (*keyed, *columns)
        if header.count(name) > 1
    ]
    told += [f"has no column '{name}'" for name in missing]
    if not keyed:
        # And nothing of the others: without a header, a column that is called like a class is a
        # patient's.
        names = ", ".join(f"'{name}'" for name in KEY_COLUMNS[:-1])
        told, missing = [f"has no column {names} or '{KEY_COLUMNS[-1]}'"], [*columns]
    named = [f"'{settings.columns[name]}' for {name}" for name in settings.columns]
    parts = [described(header, _shown(columns, task))]
    if named:
        parts.append(f"[data.labels] in site.toml names {', '.join(named)}.")
    lacking = [*missing, *([] if keyed else [KEY_COLUMNS[-1]])]
    example = ", ".join(f'{_quoted(name)} = "..."' for name in lacking)
    ours = " and one ".join(f"'{name}'" for name in columns)
    remedy = (
        f"In its first line, name one column {', '.join(KEY_COLUMNS[:-1])} or {KEY_COLUMNS[-1]}, "
        f"and one {ours}; spelling and case must match."
    )
    if lacking:
        remedy += (
            " Or leave the file as it is, and say in site.toml, below [data.labels], what it calls "
            f"them: columns = {{ {example} }}"
        )
    return LabelsInvalid(
        f"The labels file {', and '.join(told)}.", why=" ".join(parts), remedy=remedy
    )


def _quoted(name: str) -> str:
    """A key of TOML."""
    is_bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if is_bare else json.dumps(name, ensure_ascii=False)


def alternatives(names: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


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
