"""The log's file: entries in a hash chain that both sides attest.

JSON Lines, one entry a line, canonical (keys sorted, no white space). Each entry carries the hash
of the one before and its own: SHA-256 over a label and the rest of the line, the previous hash
among it. Whoever edits the file can make a new chain, so the writer signs the head from time to
time (Ed25519), and the two sides tell each other their heads with every message and note them:
cutting the end off, or rolling both the file and its signatures back, shows in the other side's
log.

The other side knows the head, and much of what an entry says can be guessed. So each entry has a
salt of its own, 32 bytes of the operating system's randomness, in what is hashed: whoever lacks
the line cannot try guesses against its hash, and the salts of other lines do not help.

An entry speaks of messages, studies, codes, bytes and hashes; never of a patient, a path or a
library's text.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cloister_fl.audit_log.heads import name_of
from cloister_fl.encoding.canonical_json import (
    GENESIS,
    HASH,
    canonical_json,
    entry_hash,
    parse_canonical,
)
from cloister_fl.encoding.framing import u64
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.membership.identity import Identity
from cloister_fl.system import utc
from cloister_fl.system.files import Mark, locked, mark_of

LABEL = b"cloister/audit/v2\0"
SIGN_LABEL = "cloister/audit/head/v2"
MAX_LINE = 1 << 17
"""Longest line that is written and read, in bytes: a thousand sites by name and node fit."""
SALT_BYTES = 32

_FIXED = {"hash", "kind", "previous", "salt", "seq", "time"}
Value = str | int | bool | None


@dataclass(frozen=True)
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


@dataclass
class _Verified:
    """What a log was when it was last read whole, and has become by the entries written since."""

    hashes: set[str]
    is_torn: bool
    """Whether a line that a kill cut short is behind the head."""


class AuditLog:
    """The log in one file; several processes may write to it.

    A file without the last entry that was verified or written here is refused, whatever reads it or
    appends to it: it is an older log, or another one.

    Args:
        path: the file; made with mode 0600 at the first entry. Its folder must exist.
        identity: signs the head.
        pin: entry that the file must have, as of another ``AuditLog`` of this process.
    """

    def __init__(self, path: Path, identity: Identity, *, pin: Head = EMPTY) -> None:
        self._path = path
        self._identity = identity
        self._name = name_of(identity.public)
        self._verified: _Verified | None = None
        self._pin = pin
        self._mark: Mark | None = None
        """Of the file when the pin was its end; None where that is not known."""

    @property
    def pin(self) -> Head:
        """The last entry that was verified or written here; ``EMPTY`` before the first."""
        return self._pin

    def append(self, kind: str, **body: Value) -> Head:
        """Write one entry, durably.

        A last line that a kill cut short is no entry: it is taken off, and a ``recovered`` entry
        says that it was there.

        Raises:
            AuditLogDamaged: the end of the file is not a log's, it cannot be written, or somebody
                else changed it and it is not sound or lacks what was verified or written here.
        """
        if _FIXED & body.keys():
            raise ValueError("an entry's fixed fields are not its body")
        return self._append(kind, lambda _: body)

    def sign(self) -> Head:
        """Write an entry that signs everything before it."""

        def signed(head: Head) -> Mapping[str, Value]:
            signature = self._identity.sign(SIGN_LABEL, u64(head.seq), head.hash.encode())
            return {"key": self._identity.public.hex(), "signature": signature.hex()}

        return self._append("signed", signed)

    def verify(self) -> tuple[Entry, ...]:
        """Read the whole log and remember how its file looks; give its entries, oldest first.

        From then on, ``is_as_verified`` says at little cost whether anybody else touched it, and
        what is written here is part of it. A last line that a kill cut short is no entry.

        Raises:
            AuditLogDamaged: at the first line that does not fit; or the last entry that was
                verified or written here is gone, as in an older log.
        """
        self._verified = self._mark = None
        if mark_of(self._path) is None:
            mark, lines = None, []
        else:
            with self._locked() as file:
                mark = mark_of(file.fileno())
                lines = file.readlines()
        entries, is_torn = self._read_whole(lines)
        self._pin = Head(entries[-1].seq, entries[-1].hash) if entries else EMPTY
        self._mark = None if is_torn else mark
        self._verified = _Verified({entry.hash for entry in entries}, is_torn)
        return entries

    def is_as_verified(self) -> bool:
        """Whether nobody else touched the file since ``verify``, and it ends with an entry.

        Raises:
            AuditLogDamaged: it cannot be looked at.
        """
        if self._verified is None or self._verified.is_torn:
            return False
        try:
            return self._mark == mark_of(self._path)
        except OSError as error:
            raise damaged("It cannot be read.") from error

    def holds(self, digest: str) -> bool:
        """Whether an entry has this hash; of the entries that were verified or written here."""
        return self._verified is not None and digest in self._verified.hashes

    def note(self, head: Head, base: str = "") -> str:
        """What the other side is told of a head, for ``heads.parse_note``; not its number.

        Args:
            head: of this log.
            base: hash of the entry that the other side was told before; empty where that is not
                known.
        """
        told = f"{self._name}:{head.hash}"
        return f"{told}:{base}" if base else told

    def entries(self) -> Iterator[Entry]:
        """Its entries, oldest first; a last line that a kill cut short is none.

        Raises:
            AuditLogDamaged: at the first line that does not fit; or at the end, where the last
                entry that was verified or written here is gone.
        """
        pin, last = self._pin, 0
        if self._path.exists():
            for entry in _read(line for line in lines_of(self._path) if line.endswith(b"\n")):
                if entry.seq == pin.seq and entry.hash != pin.hash:
                    break
                last = entry.seq
                yield entry
        if last < pin.seq:
            raise _gone(pin)

    def head(self) -> Head:
        """The head; ``EMPTY`` where nothing was written yet."""
        if not self._path.exists():
            self._read_whole([])
            return EMPTY
        with self._locked() as file:
            return self._end(file)[0]

    def _append(self, kind: str, body: Callable[[Head], Mapping[str, Value]]) -> Head:
        """Write an entry whose body may depend on the head before it."""
        with self._locked() as file:
            head, torn = self._end(file)
            if torn:
                head = write(file, head, "recovered", {"bytes": torn})
            head = write(file, head, kind, body(head))
            if self._verified is not None:
                self._verified.hashes.add(head.hash)
            # The mark last: whatever ends this before it, the log is read whole the next time.
            self._pin = head
            self._mark = mark_of(file.fileno())
        return head

    def _end(self, file: BinaryIO) -> tuple[Head, int]:
        """The head of the locked file, and how many bytes of a torn line were taken off behind it.

        Raises:
            AuditLogDamaged: its end is not a log's; or somebody else changed it, and it is not
                sound or lacks the pin.
        """
        if self._mark is not None and self._mark == mark_of(file.fileno()):
            return self._pin, 0
        # Somebody else wrote: what that was is for ``verify`` to say, but it must be a log that
        # went on from what was verified or written here. It was perhaps replaced or written while
        # this process waited for the lock.
        self._verified = self._mark = None
        if self._pin.seq:
            file.seek(0)
            self._read_whole(file.readlines())
        return _last(file)

    def _read_whole(self, lines: list[bytes]) -> tuple[tuple[Entry, ...], bool]:
        """The entries of all lines of the file, and whether a torn line is behind them.

        Raises:
            AuditLogDamaged: see ``verify``.
        """
        is_torn = bool(lines) and not lines[-1].endswith(b"\n")
        entries, pin = tuple(_read(lines[:-1] if is_torn else lines)), self._pin
        if pin.seq > len(entries) or (pin.seq and entries[pin.seq - 1].hash != pin.hash):
            raise _gone(pin)
        return entries, is_torn

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with locked(self._path) as handle, os.fdopen(handle, "r+b", closefd=False) as file:
                yield file
        except OSError as error:
            raise damaged("It cannot be read or written.") from error


def write(file: BinaryIO, head: Head, kind: str, body: Mapping[str, Value]) -> Head:
    """Write the entry behind ``head`` at the end of a file, durably; its head.

    Raises:
        ValueError: it is longer than a line may be.
    """
    full = {
        **body,
        "kind": kind,
        "previous": head.hash,
        "salt": secrets.token_hex(SALT_BYTES),
        "seq": head.seq + 1,
        "time": utc.timestamp(),
    }
    digest = hash_of(full)
    file.seek(0, os.SEEK_END)
    line = canonical_json({**full, "hash": digest}).encode() + b"\n"
    if len(line) > MAX_LINE:
        # It could never be read again, and nothing after it.
        raise ValueError("an entry is longer than a line may be")
    file.write(line)
    file.flush()
    os.fsync(file.fileno())
    return Head(head.seq + 1, digest)


def _last(file: BinaryIO) -> tuple[Head, int]:
    """The head, and how many bytes of a torn line were taken off behind it."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 2 * MAX_LINE)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"\n") + 1
    torn = len(tail) - end
    if torn:
        if end == 0 and start > 0:
            raise damaged("Its last line is incomplete.")
        file.truncate(start + end)
    lines = tail[:end].splitlines()
    if not lines:
        return EMPTY, torn
    entry = parse(lines[-1])
    if entry is None and is_unsalted(lines[-1]):
        raise _unsalted()
    if entry is None or hash_of(whole(entry)) != entry.hash:
        raise damaged("The hash of its last line is wrong.")
    return Head(entry.seq, entry.hash), torn


def read(path: Path) -> Iterator[Entry]:
    """Give the entries of a sound log, oldest first.

    Raises:
        AuditLogDamaged: at the first line that does not fit.
    """
    yield from _read(lines_of(path))


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


def _read(lines: Iterable[bytes]) -> Iterator[Entry]:
    head = EMPTY
    for number, line in enumerate(lines, start=1):
        entry = parse(line)
        if entry is None and number == 1 and is_unsalted(line):
            raise _unsalted()
        if entry is None or hash_of(whole(entry)) != entry.hash or entry.seq != head.seq + 1:
            raise damaged(f"Line {number} was changed; 'cloister verify' lists all errors.")
        if entry.previous != head.hash:
            raise damaged(f"Line {number} does not follow the line before it.")
        head = Head(entry.seq, entry.hash)
        yield entry


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines of a file, none longer than is read.

    Raises:
        AuditLogDamaged: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except OSError as error:
        raise damaged("It cannot be read.") from error


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
            {name: value for name, value in full.items() if name not in _FIXED},
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
    return full is not None and full.keys() & _FIXED == _FIXED - {"salt"}


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


def _gone(pin: Head) -> AuditLogDamaged:
    return damaged(f"Its entry {pin.seq} is gone, or another one stands in its place.")


def damaged(why: str) -> AuditLogDamaged:
    return AuditLogDamaged(
        "The audit log cannot be trusted.",
        why=why,
        remedy="Keep the file, find out who changed it, and compare it with the other side's: "
        "cloister verify LOG --against OTHER_LOG",
    )


def _unsalted() -> AuditLogDamaged:
    return AuditLogDamaged(
        "The audit log cannot be continued.",
        why="Its entries have no salt: an earlier version of Cloister wrote it.",
        remedy="Keep the file under another name, and start a new log: cloister explain CLO-306",
    )
