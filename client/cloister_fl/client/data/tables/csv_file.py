"""CSV file that a person keeps, read whole, with its faults by line.

Faults name lines, never values: a cell may be a patient's. Of the first line no cell is repeated
either, for it may be a patient's row.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cloister_fl.client.site.label_settings import composed
from cloister_fl.errors import DataError, ErrorKind
from cloister_fl.system.text import counted, listed

MAX_BYTES = 64 << 20
"""Largest file; a million rows fit."""
MAX_LINE = 1 << 16
"""Longest line, in characters, where lines are read apart."""
SHOWN = 20
"""Most lines that one message lists."""

_DELIMITERS = (",", ";", "\t")
_STATED = re.compile(r'"?sep=([,;|\t])"?', re.IGNORECASE)
_PLURAL = {"has": "have", "is": "are", "names": "name"}

_WORKBOOKS = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", " of an older Excel (.xls)"),
    (b"PK\x03\x04", " whose name does not end in .xlsx"),
)
"""How workbooks begin: MS-CFB section 2.2; a ZIP file."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and what text begins with each."""

_UNSEEN = re.compile(r"[\W_]+")
"""What people add to a column's name, or leave out of it: spaces and punctuation."""

Invalid = type[DataError] | ErrorKind[DataError]
"""The error of a file that cannot be used."""
Faults = list[tuple[int, str]]
"""Lines, 1-based, and what is wrong with each: a predicate that begins with ``has`` or ``is``."""


def read_bytes(path: Path, what: str, setting: str, invalid: Invalid) -> bytes:
    """Return a file's content; arguments and errors as of ``read_text``, whatever it holds."""
    remedy = f"Check '{setting}' in site.toml, and that this user may read the file."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise invalid(f"The {what} is larger than 64 MiB.", remedy=remedy)
        return path.read_bytes()
    except OSError as error:
        why = (error.strerror or "The system gave no reason") + "."
        raise invalid(f"The {what} cannot be read.", why=why, remedy=remedy) from None


def read_text(
    path: Path,
    what: str,
    setting: str,
    invalid: Invalid,
    *,
    encoding: str = "utf-8",
    remedy: str = "Save it as UTF-8.",
) -> str:
    """Return the text of a file; one with a byte order mark is UTF-8 or UTF-16.

    Args:
        path: where it lies.
        what: what it is called, such as ``labels file``.
        setting: its key in ``site.toml``.
        invalid: the error to raise.
        encoding: of a file without a byte order mark.
        remedy: what to do about a file in another encoding.

    Raises:
        DataError: of ``invalid``: it is too large, cannot be read, or is in another encoding.
    """
    data = read_bytes(path, what, setting, invalid)
    if kind := next((kind for mark, kind in _WORKBOOKS if data.startswith(mark)), ""):
        raise invalid(
            f"The {what} is a workbook{kind}, and not CSV.",
            remedy="Save it as .xlsx, or as CSV (UTF-8), and name that file in site.toml.",
        )
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), encoding)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.upper().removesuffix("-SIG")
        raise invalid(f"The {what} is not {name} text: see line {line}.", remedy=remedy) from None


@dataclass(frozen=True)
class Header:
    """The line of a file that names its columns.

    Attributes:
        cells: its cells, as ``ours`` calls them.
        delimiter: what separates cells: comma, semicolon or tab, or what a line ``sep=`` says.
        line: its number, 1-based; 2 behind a line ``sep=``.
    """

    cells: list[str]
    delimiter: str
    line: int = 1


def header_of(
    text: str, wanted: Sequence[str], keys: Sequence[str], ours: Callable[[str], str] = str
) -> Header:
    """Find what names the columns, and what separates cells.

    Args:
        text: the file, or its first two lines.
        wanted: columns that it must have.
        keys: columns of which it must have one.
        ours: what we call the column of a name.
    """
    lines = text.splitlines()[:2] if text.strip() else [""]
    delimiters: Sequence[str] = _DELIMITERS
    line = 1
    # Excel's own way to say it, and not a row.
    if (stated := _STATED.fullmatch(lines[0])) and len(lines) > 1:
        delimiters, line = [stated[1]], 2
    parsed: list[list[str]] = []
    for delimiter in delimiters:
        try:
            cells = next(csv.reader([lines[line - 1]], delimiter=delimiter, strict=True), [])
        except csv.Error:
            cells = []
        parsed.append([ours(composed(cell)) for cell in cells])
        if set(wanted) <= set(parsed[-1]) and any(name in parsed[-1] for name in keys):
            return Header(parsed[-1], delimiter, line)
    best = max(range(len(parsed)), key=lambda index: len(parsed[index]))
    return Header(parsed[best], delimiters[best], line)


def described(header: Sequence[str], names: Sequence[str]) -> str:
    """Describe a first line without its content; a file without a header begins with a patient.

    Args:
        header: its cells.
        names: columns that may be named, where a cell is one but for case, spaces or punctuation.
    """
    if not any(header):
        return "Its first line is empty."
    parts = [
        f"Its first line has {counted(len(header), 'column')}",
        *(
            f"column {number} is '{name}' except for case, spaces or punctuation"
            for number, cell in enumerate(header, start=1)
            for name in names
            if cell != name and bare(cell) == bare(name)
        ),
    ]
    if len(header) == 1:
        parts.append("columns are separated by commas, semicolons or tabs")
    return "; ".join(parts[:SHOWN]) + "."


def bare(name: str) -> str:
    """A column's name without case, spaces and punctuation."""
    return _UNSEEN.sub("", name).casefold()


def rows_of(
    text: str, delimiter: str, faults: Faults, *, apart: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line and its stripped cells; a broken row ends the reading.

    Args:
        text: the file.
        delimiter: what separates cells.
        faults: gets what is wrong.
        apart: a row that ``lines_apart`` would not read is a fault, too.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    if apart:
        each = enumerate(io.StringIO(text), start=1)
        long = [number for number, one in each if len(one) > MAX_LINE]
        faults.extend((number, f"is longer than {MAX_LINE:,} characters") for number in long)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            faults.append((line, "is not CSV; a quotation mark may be missing"))
            return
        if apart and reader.line_num > line:
            faults.append((line, "has a line break in a cell"))
        yield line, [composed(cell) for cell in cells]
        line = reader.line_num + 1


def first_lines(
    path: Path, what: str, setting: str, invalid: Invalid, *, encoding: str = "utf-8"
) -> str:
    """The first two lines of a file, whatever it holds.

    Arguments and errors as of ``read_text``.
    """
    two = islice(_lines(path, what, setting, invalid, encoding), 2)
    return "\n".join(line or "" for line in two)


def lines_apart(
    path: Path,
    delimiter: str,
    what: str,
    setting: str,
    invalid: Invalid,
    *,
    encoding: str = "utf-8",
) -> Iterator[tuple[int, list[str]]]:
    """Yield each line's number and its stripped cells; one that is not CSV by itself is left out.

    A row that a quotation mark carries into the next line is two broken ones: it could swallow
    another patient's. The file may have any size, a line ``MAX_LINE`` characters.

    Args:
        path: the file.
        delimiter: what separates cells.
        what, setting, invalid: as of ``read_text``.
        encoding: one in which a byte that is missing spoils its own line alone.

    Raises:
        DataError: of ``invalid``: the file cannot be read.
    """
    for number, line in enumerate(_lines(path, what, setting, invalid, encoding), start=1):
        if line is None:
            continue
        try:
            cells = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        yield number, [composed(cell) for cell in cells]


def _lines(
    path: Path, what: str, setting: str, invalid: Invalid, encoding: str
) -> Iterator[str | None]:
    """Yield lines without their ends; None for one that is too long."""
    remedy = f"Check '{setting}' in site.toml, and that this user may read the file."
    try:
        encoding = "utf-8-sig" if encoding == "utf-8" else encoding
        with path.open(encoding=encoding, errors="replace") as file:
            while line := file.readline(MAX_LINE):
                is_whole, rest = True, line
                while rest and not rest.endswith("\n"):
                    rest = file.readline(MAX_LINE)
                    is_whole = is_whole and not rest
                yield line.removesuffix("\n") if is_whole else None
    except OSError as error:
        why = (error.strerror or "The system gave no reason") + "."
        raise invalid(f"The {what} cannot be read.", why=why, remedy=remedy) from None


def listing(faults: Faults, more: Sequence[str] = ()) -> str:
    """Return what is wrong, a sentence each on a line of its own, and how much of it there is.

    Args:
        faults: of single lines; the same fault in many lines is one sentence.
        more: further sentences, each one fault.
    """
    lines_of: dict[str, list[int]] = defaultdict(list)
    for line, message in sorted(faults):
        lines_of[message].append(line)
    sentences = [f"{lines(found)} {_agree(what, found)}." for what, found in lines_of.items()]
    sentences += more
    rows = "".join(f"\n  {sentence}" for sentence in sentences[:SHOWN])
    rest = f"\n  and {len(sentences) - SHOWN} more." if len(sentences) > SHOWN else ""
    return f"{counted(len(faults) + len(more), 'fault')}:{rows}{rest}\n"


def lines(numbers: Sequence[int]) -> str:
    """``Line 1``, ``Lines 1 and 2``; at most ``SHOWN`` of them."""
    if len(numbers) == 1:
        return f"Line {numbers[0]}"
    if len(numbers) > SHOWN:
        return f"Lines {listed(map(str, numbers), SHOWN)}"
    return f"Lines {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _agree(message: str, numbers: Sequence[int]) -> str:
    """Put the verb that begins a message into the plural where it is about several lines."""
    verb, _, rest = message.partition(" ")
    return message if len(numbers) == 1 else f"{_PLURAL[verb]} {rest}"
