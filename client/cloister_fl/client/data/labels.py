"""Labels file of a site: a CSV kept by a person, checked and joined to the images.

Rows are keyed by SOPInstanceUID, else AccessionNumber, else PatientID: the first of these columns
that the file has. Faults name lines, never values, for a key is a patient's. Of the first line no
cell is repeated, for it may be a patient's row: messages say how many columns it has, and which of
them are called almost as they must be.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.folder import command_at
from cloister_fl.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage
from cloister_fl.system.text import counted, listed
from cloister_fl.tasks import LabelsFile, Task

KEY_COLUMNS = ("SOPInstanceUID", "AccessionNumber", "PatientID")
MAX_BYTES = 64 << 20
"""Largest labels file; a million rows fit."""
SHOWN = 20
"""Most lines or images that one message lists."""

_DELIMITERS = (",", ";", "\t")
_PLURAL = {"has": "have", "is": "are"}

_UNSEEN = re.compile(r"[\W_]+")
"""What people add to a column's name, or leave out of it: spaces and punctuation."""


@dataclass(frozen=True)
class Label:
    """One row of the file: its 1-based line and the record that it holds, see ``Task``."""

    line: int
    value: Hashable


@dataclass(frozen=True)
class Labels:
    """A labels file without faults of its own.

    Attributes:
        column: the key column, one of ``KEY_COLUMNS``.
        rows: from key to label, in the order of the file.
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
    """

    keys: Keys
    patient: str
    duplicate: bool = False
    later: bool = False


def read_labels(path: Path, task: Task) -> Labels:
    """Read and judge the labels file of a task that has one.

    Raises:
        LabelsInvalid: with every faulty line.
    """
    text = _decoded(_read_bytes(path))
    faults: list[tuple[int, str]] = []
    labels = _parsed(text, task, faults)
    if faults:
        raise _invalid(faults, task.allowed)
    return labels


def sound_labels(path: Path, task: Task) -> Labels:
    """Read what can be used of a labels file: a row with a fault counts as absent, alone.

    A run with privacy reads labels so: what one patient's row says has no bearing on another's.
    Of rows with one key none counts.

    Raises:
        LabelsInvalid: the file cannot be read, or its first line does not say what is in it.
    """
    text = _read_bytes(path).decode("utf-8-sig", "replace")
    return _parsed(text, task, None)


def _parsed(text: str, task: Task, faults: list[tuple[int, str]] | None) -> Labels:
    """Read the rows; those with a fault are left out, and listed where ``faults`` is given."""
    alone = faults is None
    faults = [] if faults is None else faults
    wanted = task.source.columns if isinstance(task.source, LabelsFile) else ()
    header, delimiter = _header(text, wanted)
    column = next((name for name in KEY_COLUMNS if name in header), None)
    if column is None or any(header.count(name) != 1 for name in (column, *wanted)):
        raise _header_invalid(header, column, wanted, task)
    at_key, at_values = header.index(column), [header.index(name) for name in wanted]
    rows: dict[str, Label] = {}
    twice: set[str] = set()
    for line, cells in _rows_apart(text, delimiter) if alone else _rows(text, delimiter, faults):
        if line == 1 or not any(cells):
            continue
        if len(cells) != len(header):
            faults.append((line, "has another number of cells than the first line"))
        elif not cells[at_key]:
            faults.append((line, f"has no {column}"))
        elif empty := [header[place] for place in at_values if not cells[place]]:
            faults.append((line, f"has no {empty[0]}"))
        elif cells[at_key] in rows:
            first = rows[cells[at_key]].line
            faults.append((line, f"has the same {column} as line {first}"))
            twice.add(cells[at_key])
        else:
            try:
                record = task.record([cells[place] for place in at_values])
            except ValueError as error:
                faults.append((line, str(error)))
            else:
                rows[cells[at_key]] = Label(line, record)
    return Labels(column, {key: row for key, row in rows.items() if key not in twice})


def join(
    labels: Labels, images: Sequence[Linked], root: Path | None = None, *, alone: bool = False
) -> tuple[list[Hashable | None], list[DataError]]:
    """Give each image its label, and list all that does not fit.

    A row may speak for several images, never for several patients; a patient has one label. A
    duplicate takes no label of its own, but a row that names it belongs to its patient.

    Args:
        labels: the labels file, as read.
        images: the images to join it to.
        root: the site folder, for the commands of the remedies.
        alone: give no label to a patient whose rows disagree or are shared with another patient.

    Returns:
        The record of each image, None where there is none; and the faults found, as errors
        that the caller may raise or list.
    """
    attribute = {
        "SOPInstanceUID": "sop_instance",
        "AccessionNumber": "accession",
        "PatientID": "patient_id",
    }[labels.column]
    patients_of: dict[str, set[str]] = defaultdict(set)
    rows_of: dict[str, set[Label]] = defaultdict(set)
    direct: list[Label | None] = []
    used: set[str] = set()
    for image in images:
        key = getattr(image.keys, attribute)
        label = labels.rows.get(key)
        if label is not None:
            used.add(key)
        if image.later:
            label = None
        direct.append(label)
        if label is not None:
            patients_of[key].add(image.patient)
            rows_of[image.patient].add(label)
    faults: list[tuple[int, str]] = [
        (labels.rows[key].line, f"has a {labels.column} that several patients share")
        for key, patients in patients_of.items()
        if len(patients) > 1
    ]
    conflicts = sorted(
        sorted(row.line for row in rows)
        for rows in rows_of.values()
        if len({row.value for row in rows}) > 1
    )
    errors: list[DataError] = []
    if faults or conflicts:
        remedy = "Correct these lines: a patient has one class, and a row names one patient."
        errors.append(_invalid(faults, remedy, conflicts))
    inherited = _from_duplicates(images, direct)
    values = [
        label.value if label is not None else inherited.get(image.patient)
        for image, label in zip(images, direct, strict=True)
    ]
    errors += _unmatched(labels, images, values, used, root)
    if alone:
        shared = {one for owners in patients_of.values() if len(owners) > 1 for one in owners}
        torn = {one for one, rows in rows_of.items() if len({row.value for row in rows}) > 1}
        values = [
            None if image.patient in shared | torn else value
            for image, value in zip(images, values, strict=True)
        ]
    return values, errors


def _from_duplicates(
    images: Sequence[Linked], direct: Sequence[Label | None]
) -> dict[str, Hashable]:
    """Return what rows for duplicates say of their patients; the kept twin may have no row."""
    return {
        image.patient: label.value
        for image, label in zip(images, direct, strict=True)
        if image.duplicate and label is not None
    }


def _unmatched(
    labels: Labels,
    images: Sequence[Linked],
    values: Sequence[Hashable | None],
    used: set[str],
    root: Path | None,
) -> Iterator[DataError]:
    missing = [
        image.patient[:12]
        for image, value in zip(images, values, strict=True)
        if value is None and not image.duplicate
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


def _read_bytes(path: Path) -> bytes:
    remedy = "Check 'data.labels' in site.toml, and that this user may read the file."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LabelsInvalid("The labels file is larger than 64 MiB.", remedy=remedy)
        return path.read_bytes()
    except OSError as error:
        why = (error.strerror or "The system gave no reason") + "."
        raise LabelsInvalid("The labels file cannot be read.", why=why, remedy=remedy) from None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabelsInvalid(
            f"The labels file is not UTF-8 text: see line {line}.", remedy="Save it as UTF-8."
        ) from None


def _header(text: str, wanted: Sequence[str]) -> tuple[list[str], str]:
    """Return the first line's cells and what separates them: comma, semicolon or tab."""
    first = text.splitlines()[0] if text.strip() else ""
    parsed: list[list[str]] = []
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([first], delimiter=delimiter, strict=True), [])
        except csv.Error:
            cells = []
        parsed.append([cell.strip() for cell in cells])
        if set(wanted) <= set(parsed[-1]) and any(name in parsed[-1] for name in KEY_COLUMNS):
            return parsed[-1], delimiter
    best = max(range(len(parsed)), key=lambda index: len(parsed[index]))
    return parsed[best], _DELIMITERS[best]


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
        why=_described(header, columns, task),
        remedy=f"In its first line, name one column {', '.join(KEY_COLUMNS[:-1])} or "
        f"{KEY_COLUMNS[-1]}, and one '{wanted}'; spelling and case must match.",
    )


def _described(header: Sequence[str], columns: Sequence[str], task: Task) -> str:
    """Describe a first line without its content; a file without a header begins with a patient.

    Names of columns that the study and Cloister give are all that is shown of it, and none that
    is also a class: a patient's row may hold one.
    """
    if not any(header):
        return "Its first line is empty."
    classes = {_bare(name) for name in task.strata}
    names = [name for name in (*KEY_COLUMNS, *columns) if _bare(name) not in classes]
    parts = [
        f"Its first line has {counted(len(header), 'column')}",
        *(
            f"column {number} is '{name}' except for case, spaces or punctuation"
            for number, cell in enumerate(header, start=1)
            for name in names
            if cell != name and _bare(cell) == _bare(name)
        ),
    ]
    if len(header) == 1:
        parts.append("columns are separated by commas, semicolons or tabs")
    return "; ".join(parts[:SHOWN]) + "."


def _bare(name: str) -> str:
    return _UNSEEN.sub("", name).casefold()


def _rows(
    text: str, delimiter: str, faults: list[tuple[int, str]]
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line and its stripped cells; a broken row ends the reading."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            faults.append((line, "is not CSV; a quotation mark may be missing"))
            return
        yield line, [cell.strip() for cell in cells]
        line = reader.line_num + 1


def _rows_apart(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield rows as ``_rows`` does; where one is broken, reading goes on in the line behind it."""
    lines = list(io.StringIO(text, newline=""))
    start = 0
    while start < len(lines):
        rest = (lines[place] for place in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        read = 0
        try:
            for cells in reader:
                yield start + read + 1, [cell.strip() for cell in cells]
                read = reader.line_num
        except csv.Error:
            read += 1
        start += read


def _invalid(
    faults: list[tuple[int, str]], remedy: str, conflicts: Sequence[Sequence[int]] = ()
) -> LabelsInvalid:
    """Return the error that lists faults of lines, and lines that give one patient two classes."""
    # The same fault in many rows is one fault with many lines.
    lines_of: dict[str, list[int]] = defaultdict(list)
    for line, message in sorted(faults):
        lines_of[message].append(line)
    sentences = [
        f"{_lines(lines)} {_agree(message, lines)}." for message, lines in lines_of.items()
    ]
    sentences += [f"{_lines(lines)} give one patient two classes." for lines in conflicts]
    rows = "".join(f"\n  {sentence}" for sentence in sentences[:SHOWN])
    more = f"\n  and {len(sentences) - SHOWN} more." if len(sentences) > SHOWN else ""
    count = counted(len(faults) + len(conflicts), "fault")
    return LabelsInvalid(f"The labels file has {count}:{rows}{more}\n", remedy=remedy)


def _lines(lines: Sequence[int]) -> str:
    if len(lines) == 1:
        return f"Line {lines[0]}"
    if len(lines) > SHOWN:
        return f"Lines {listed(map(str, lines), SHOWN)}"
    return f"Lines {', '.join(map(str, lines[:-1]))} and {lines[-1]}"


def _agree(message: str, lines: Sequence[int]) -> str:
    """Put the verb that begins a message into the plural where it is about several lines."""
    verb, _, rest = message.partition(" ")
    return message if len(lines) == 1 else f"{_PLURAL[verb]} {rest}"
