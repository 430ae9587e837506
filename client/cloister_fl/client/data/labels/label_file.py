"""Labels file of a site: a table kept by a person, read and checked; see ``row_matching``.

A row is keyed by its SOPInstanceUID, else its AccessionNumber, else its StudyInstanceUID, else its
PatientID: the first of these that it has, whatever other rows have (``label_settings`` has the
order where patients are labelled). Faults name lines, never values, for a key is a
patient's. Of the first line no cell is repeated, for it may be a patient's row: messages say how
many columns it has, and which of them are called almost as they must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.data.tables.csv_file import (
    Faults,
    Header,
    bare,
    described,
    first_lines,
    header_of,
    lines_apart,
    listing,
    read_text,
    rows_of,
)
from cloister_fl.client.data.tables.spreadsheet import is_spreadsheet, rows_of_sheet
from cloister_fl.client.site.label_settings import KEY_COLUMNS, OF_PATIENTS, LabelSettings, composed
from cloister_fl.errors import DataError, LabelsInvalid
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
        key: what stands in the key column, as it is written.
    """

    line: int
    value: Hashable
    cells: tuple[str, ...] = field(default=(), repr=False)
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Labels:
    """A labels file without faults of its own.

    Attributes:
        rows: from key column and key to label, in the order of the file; a PatientID as
            ``read_labels`` was told to read it.
    """

    rows: dict[Key, Label] = field(repr=False)


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
        raise invalid_rows(faults, _allowed(task))
    return labels


def tolerant_labels(
    path: Path, task: Task, number: Callable[[str], str], settings: LabelSettings
) -> tuple[Labels, int, list[DataError]]:
    """The rows without a fault of their own, how many have one, and what; for a person to see.

    Args and raises as ``read_labels``, of what is no fault of single rows.
    """
    faults: Faults = []
    labels = _read(path, task, number, settings, faults)
    return labels, len(faults), [invalid_rows(faults, _allowed(task))] if faults else []


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


def _allowed(task: Task) -> str:
    """What a row may say, and where a file's own words for it are named."""
    words = [
        f'values.{_quoted(name)} = {{ "..." = {json.dumps(task.strata[0], ensure_ascii=False)} }}'
        for name in _wanted(task)
    ]
    return (
        f"{task.allowed} What the file calls them is said in site.toml, below [data.labels]: "
        f'{", ".join(words)}. Below [data], on_mismatch = "leave out" goes on without such rows.'
    )


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
    order = OF_PATIENTS if task.unit == "patient" else KEY_COLUMNS
    keyed = [name for name in order if name in header]
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
        else:
            values = [settings.value(header[place], cells[place]) for place in at_values]
            try:
                record = task.record(values)
            except ValueError as error:
                faults.append((line, str(error)))
                continue
            known = rows.setdefault(key, Label(line, record, tuple(values), cell))
            # A table of examinations names a patient again and again; what counts is one word.
            if known.value != record:
                faults.append(
                    (line, f"has another label than line {known.line} of the same {column}")
                )
                twice.add(key)
    return Labels({key: row for key, row in rows.items() if key not in twice})


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
    if is_spreadsheet(Path(settings.file)) and not settings.sheet:
        parts.append(
            "The first sheet was read; 'sheet' below [data.labels] names another. The columns' "
            "names stand in its first row that is not empty."
        )
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


def invalid_rows(faults: Faults, remedy: str, conflicts: Sequence[str] = ()) -> LabelsInvalid:
    """Return the error that lists faults of lines, and sentences on lines that contradict."""
    error = LabelsInvalid(f"The labels file has {listing(faults, conflicts)}", remedy=remedy)
    return error.about(rows=[(line, "") for line, _ in faults])
