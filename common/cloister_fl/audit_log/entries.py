"""Entries of an audit log: one line each, canonical, salted and chained by their hashes.

JSON Lines, one entry a line, canonical (keys sorted, no white space). Each entry carries the hash
of the one before and its own: SHA-256 over a label and the rest of the line, the previous hash
among it.

The other side knows the head, and much of what an entry says can be guessed. So each entry has a
salt of its own, 32 bytes of the operating system's randomness, in what is hashed: whoever lacks
the line cannot try guesses against its hash, and the salts of other lines do not help.

An entry speaks of messages, studies, codes, bytes and hashes; never of a patient, a path or a
library's text.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cloister_fl.encoding.canonical_json import (
    GENESIS,
    HASH,
    canonical_json,
    entry_hash,
    parse_canonical,
)
from cloister_fl.errors import AuditLogDamaged

LABEL = b"cloister/audit/v2\0"
SIGN_LABEL = "cloister/audit/head/v2"
SIGNED = "signed"
SEALED = "sealed"
"""Kind of the entry behind which a file of the log takes no other but a signature."""
SEGMENT = "segment"
"""Kind of the first entry of the file after that."""
MAX_LINE = 1 << 17
"""Longest line that is written and read, in bytes: a thousand sites by name and node fit."""
SALT_BYTES = 32

FIXED = {"hash", "kind", "previous", "salt", "seq", "time"}
Value = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a log: number of its last entry (0 where there is none) and its hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


EMPTY = Head(0, GENESIS)


@dataclass(frozen=True)
class Entry:
    """One line: its number, kind, what it says, its salt, and the chain's hashes."""

    seq: int
    kind: str
    time: str
    body: Mapping[str, Value]
    salt: str
    previous: str
    hash: str


def last(file: BinaryIO, path: Path) -> tuple[Entry | None, int]:
    """The last entry of a file, and how many bytes of a torn line were taken off behind it.

    Raises:
        AuditLogDamaged: its end is not a log's.
    """
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 2 * MAX_LINE)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"\n") + 1
    torn = len(tail) - end
    lines = tail[:end].splitlines()
    if torn:
        if end == 0 and start > 0:
            raise damaged("Its last line is incomplete.", path)
        require_torn(tail[end:], path)
        file.truncate(start + end)
    if not lines:
        return None, torn
    entry = parse(lines[-1])
    if entry is None and is_unsalted(lines[-1]):
        raise unsalted(path)
    if entry is None or hash_of(whole(entry)) != entry.hash:
        raise damaged("The hash of its last line is wrong.", path)
    return entry, torn


def require_torn(rest: bytes, path: Path) -> None:
    """Refuse to take off what no kill leaves: something else than the begin of a line.

    Raises:
        AuditLogDamaged: it is something else.
    """
    if not rest.startswith(b'{"'[: len(rest)]) or not rest.isascii():
        raise damaged("What stands behind its last line is not of an audit log.", path)


def chained(lines: Iterable[bytes], path: Path, head: Head = EMPTY) -> Iterator[Entry]:
    """The entries of lines that follow ``head``, oldest first.

    Args:
        lines: of one file.
        path: the file.
        head: last entry of the file before it.

    Raises:
        AuditLogDamaged: at the first line that does not fit.
    """
    for number, line in enumerate(lines, start=1):
        entry = parse(line)
        if entry is None and number == 1 and is_unsalted(line):
            raise unsalted(path)
        if entry is None or hash_of(whole(entry)) != entry.hash:
            raise _changed(number, path)
        if number == 1 and entry.kind == SEGMENT and entry.seq > head.seq + 1:
            why = f"The sealed segment before {path.name}, or its end, is missing."
            raise damaged(why, path)
        if entry.seq != head.seq + 1:
            raise _changed(number, path)
        if entry.previous != head.hash:
            raise damaged(f"Line {number} does not follow the line before it.", path)
        head = Head(entry.seq, entry.hash)
        yield entry


def parse(line: bytes) -> Entry | None:
    """The entry of a line, whether or not its hashes hold; None where it has no entry's form."""
    full = parse_canonical(line.removesuffix(b"\n"))
    if full is None:
        return None
    try:
        entry = Entry(
            full["seq"],
            full["kind"],
            full["time"],
            {name: value for name, value in full.items() if name not in FIXED},
            full["salt"],
            full["previous"],
            full["hash"],
        )
    except KeyError:
        return None
    words = (entry.kind, entry.time, entry.salt, entry.previous, entry.hash)
    if not all(isinstance(word, str) for word in words) or not HASH.fullmatch(entry.salt):
        return None
    return entry if type(entry.seq) is int and 0 < entry.seq < 2**63 else None


def is_unsalted(line: bytes) -> bool:
    """Whether a line is an entry without a salt, as earlier versions of Cloister wrote them."""
    full = parse_canonical(line.removesuffix(b"\n"))
    return full is not None and full.keys() & FIXED == FIXED - {"salt"}


def whole(entry: Entry) -> dict[str, Value]:
    """All that an entry's hash is over."""
    return {
        **entry.body,
        "kind": entry.kind,
        "previous": entry.previous,
        "salt": entry.salt,
        "seq": entry.seq,
        "time": entry.time,
    }


def hash_of(full: Mapping[str, Value]) -> str:
    """The hash of an entry, see ``whole``."""
    return entry_hash(LABEL, canonical_json(full))


def gone(pin: Head, path: Path) -> AuditLogDamaged:
    """The error of a log that lacks an entry which a process knows."""
    return damaged(f"Its entry {pin.seq} is gone, or another one stands in its place.", path)


def damaged(why: str, path: Path) -> AuditLogDamaged:
    """The error of a log, or a sealed segment, that is not as it was written."""
    return AuditLogDamaged(
        "The audit log cannot be trusted.",
        why=why,
        remedy="Keep the files, find out who changed them, and compare them with the other side's: "
        f"cloister verify {shlex.quote(str(path))} --against OTHER_LOG",
    )


def unsalted(path: Path) -> AuditLogDamaged:
    """The error of a log of an earlier version."""
    return AuditLogDamaged(
        "The audit log cannot be continued.",
        why="Its entries have no salt: an earlier version of Cloister wrote it.",
        remedy=f"Keep the file {shlex.quote(str(path))} under another name, and start a new log: "
        "cloister explain CLO-306",
    )


def _changed(number: int, path: Path) -> AuditLogDamaged:
    return damaged(f"Line {number} was changed; 'cloister verify' lists all errors.", path)
