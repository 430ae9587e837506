"""Files of an audit log: the one that is written, and the sealed segments before it.

::

    audit.000001.jsonl     sealed: never written again
    audit.000002.jsonl     sealed; its first entry follows the last of the file before it
    audit.jsonl            the entries since

Entries count on and the hash chain goes on from file to file, so all of them together are one log.
A segment ends with an entry ``sealed`` and a signature over it; the next file begins with an entry
``segment``, which has the file's number. So a sealed segment that is changed does not carry its
hashes, and one that is missing leaves a gap that the file behind it tells.

Sealing gives the full file a second name and then puts the next one, with its first entry, in the
place of the first name. Killed between the two, the file has both names and is the one that is
written, whatever its second name says.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from cloister_fl.audit_log.entries import (
    EMPTY,
    MAX_LINE,
    SEALED,
    SEGMENT,
    SIGNED,
    Entry,
    Head,
    Value,
    chained,
    damaged,
    parse,
)
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.system.files import try_lock

SEGMENT_BYTES = 1 << 20
"""Size at which a file is sealed: some hundred rounds."""

_NUMBERED = re.compile(r"(.*)\.(\d{6})(\.[^.]*)?")


@dataclass(frozen=True)
class Part:
    """One file of a log, whose lines can be read once.

    Attributes:
        path: the file.
        is_sealed: whether it is a sealed segment.
        lines: its lines, none longer than is read.
    """

    path: Path
    is_sealed: bool
    lines: Iterator[bytes]


def segment_path(path: Path, number: int) -> Path:
    """The name under which the log at ``path`` keeps its sealed segment of this number."""
    return path.with_name(f"{path.stem}.{number:06d}{path.suffix}")


def number_of(path: Path) -> int:
    """The number of a sealed segment, by its name; 0 for a file that is written."""
    named = _NUMBERED.fullmatch(path.name)
    return int(named[2]) if named else 0


def sealed(path: Path) -> tuple[Path, ...]:
    """The sealed segments of a log, oldest first.

    Args:
        path: the file that is written; or a sealed segment, for those before it.

    Raises:
        AuditLogDamaged: the folder cannot be listed.
    """
    named = _NUMBERED.fullmatch(path.name)
    stem, suffix = (named[1], named[3] or "") if named else (path.stem, path.suffix)
    most = number_of(path) or 1 << 30
    try:
        # Two names of one file: it was to be sealed when its writer was killed.
        about = path.stat() if not named and path.exists() else None
        found = [
            held
            for held in path.parent.iterdir()
            if (one := _NUMBERED.fullmatch(held.name))
            and (one[1], one[3] or "") == (stem, suffix)
            and int(one[2]) < most
        ]
        if about is not None and about.st_nlink > 1:
            found = [one for one in found if not os.path.samestat(about, one.stat())]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise damaged("It cannot be read.", path) from error
    return tuple(sorted(found))


def number_told(first: bytes) -> int:
    """The number that the first line of a file tells for it; 1 where it tells none."""
    entry = parse(first)
    number = entry.body.get("number") if entry is not None and entry.kind == SEGMENT else 1
    return number if type(number) is int and 0 < number < 10**6 else 1


def is_begun(path: Path) -> bool:
    """Whether a log has any file."""
    return path.exists() or bool(sealed(path))


@contextlib.contextmanager
def parts(path: Path) -> Iterator[list[Part]]:
    """The files of a log, oldest first, while no lock is held.

    The file that is written is opened first: what is sealed while the others are read is not read
    twice, and not passed over.

    Raises:
        AuditLogDamaged: a file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            about = os.fstat(file.fileno())
            before = [one for one in sealed(path) if not os.path.samestat(about, one.stat())]
        except OSError as error:
            raise damaged("It cannot be read.", path) from error
        found = [Part(one, True, lines_of(one)) for one in before]
        yield [*found, Part(path, False, _lines(file, path))]


def read(path: Path, *, whole_lines: bool = False) -> Iterator[Entry]:
    """Give the entries of a sound log, sealed segments first, oldest first.

    Args:
        path: the file that is written; or a sealed segment, for the log up to its end.
        whole_lines: whether a last line that a kill cut short is passed over.

    Raises:
        AuditLogDamaged: at the first line that does not fit, or where a file is missing.
    """
    head = EMPTY
    with parts(path) as found:
        for part in found:
            seq = head.seq
            lines = part.lines
            if whole_lines and not part.is_sealed:
                lines = (line for line in part.lines if line.endswith(b"\n"))
            for entry in chained(lines, part.path, head):
                head = Head(entry.seq, entry.hash)
                yield entry
            if head.seq == seq and len(found) > 1:
                raise empty(part.path)


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines of a file, none longer than is read.

    Raises:
        AuditLogDamaged: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from _lines(file, path)
    except OSError as error:
        raise damaged("It cannot be read.", path) from error


def holds_entries(path: Path) -> bool:
    """Whether any line of a file is an entry as it is written, sound or not.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while line := file.readline(2 * MAX_LINE):
            if parse(line) is not None:
                return True
    return False


def holds(path: Path, digest: str) -> bool:
    """Whether an entry of a sealed segment, which was verified, has this hash."""
    wanted = f'"hash":"{digest}"'.encode()
    return any(wanted in line for line in lines_of(path))


Write: TypeAlias = Callable[[BinaryIO, Head, str, Mapping[str, Value]], Head]
"""Writes an entry of a kind behind a head, and gives the next head; see ``log.write``."""


def seal(
    file: BinaryIO,
    path: Path,
    head: Head,
    write: Write,
    signature: Callable[[Head], Mapping[str, Value]],
) -> tuple[BinaryIO, Head]:
    """Seal the file of a log, whose lock is held, and begin the next one.

    Args:
        file: the file, open to read and write.
        path: its name.
        head: its last entry.
        write: writes an entry.
        signature: makes the body of an entry that signs a head.

    Returns:
        The next file, whose lock is held until it is closed, and its first entry.

    Raises:
        AuditLogDamaged: the name of the segment is taken by another file.
        OSError: a file cannot be written; the log is as it was, or sealed.
    """
    file.seek(0)
    number = number_told(file.readline(MAX_LINE))
    kept, folder = segment_path(path, number), path.parent
    kinds = _last_kinds(file)
    if kinds[-1:] != [SEALED] and kinds != [SEALED, SIGNED]:
        head = write(file, head, SEALED, {"number": number})
    if kinds != [SEALED, SIGNED]:
        head = write(file, head, SIGNED, signature(head))
    waiting = path.with_name(f".{path.name}.next")
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fresh = os.fdopen(os.open(waiting, flags, 0o600), "r+b")
    try:
        # Nobody else knows the file: its lock is free, and held when it gets its name.
        try_lock(fresh.fileno())
        first = write(fresh, head, SEGMENT, {"number": number + 1})
        with contextlib.suppress(FileExistsError):
            os.link(path, kept)
        if not os.path.samestat(os.fstat(file.fileno()), kept.stat()):
            raise damaged(f"{kept.name} is there already, and is another file.", path)
        _flush(folder)
        waiting.replace(path)
        _flush(folder)
    except BaseException:
        fresh.close()
        raise
    return fresh, first


def _last_kinds(file: BinaryIO) -> list[str]:
    """Kinds of the last two entries: they tell where the sealing of a file was killed."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * MAX_LINE))
    tail = [parse(line) for line in file.read().splitlines()[-2:]]
    return [entry.kind for entry in tail if entry is not None]


def empty(path: Path) -> AuditLogDamaged:
    """The error of a file without an entry, where a log has others."""
    return damaged(f"{path.name} has no entry, and sealed segments are there.", path)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while line := file.readline(MAX_LINE + 1):
            yield line
    except OSError as error:
        raise damaged("It cannot be read.", path) from error


def _flush(folder: Path) -> None:
    """Make a name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
