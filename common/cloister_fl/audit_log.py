"""The audit log: requests, actions and refusals, in a hash chain that both sides attest.

JSON Lines, one entry a line, canonical (keys sorted, no white space). Each entry carries the hash
of the one before and its own: SHA-256 over a label, the previous hash and the body. Whoever edits
the file can make a new chain, so the writer signs the head from time to time (Ed25519), and the
two sides tell each other their heads with every message and note them: cutting the end off, or
rolling both the file and its signatures back, shows in the other side's log.

An entry speaks of messages, studies, codes, bytes and hashes; never of a patient, a path or a
library's text.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cloister_fl.encoding.canonical_json import canonical_json, parse_canonical
from cloister_fl.encoding.framing import u64
from cloister_fl.encoding.hash_chain import GENESIS, HASH, entry_hash
from cloister_fl.errors import AuditLogDamaged
from cloister_fl.membership.identity import Identity, verify
from cloister_fl.system import utc
from cloister_fl.system.file_lock import locked

LABEL = b"cloister/audit/v1\0"
SIGN_LABEL = "cloister/audit/head/v1"
MAX_LINE = 1 << 17
"""Longest line that is written and read, in bytes: a thousand sites by name and node fit."""

_NOTE = re.compile(r"([0-9a-f]{16}):([0-9]{1,18}):([0-9a-f]{64})", re.ASCII)
_FIXED = {"hash", "kind", "previous", "seq", "time"}
Value = str | int | bool | None


@dataclass(frozen=True)
class Head:
    """The end of a log: number of its last entry (0 where there is none) and its hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


EMPTY = Head(0, GENESIS)


def name_of(public: bytes) -> str:
    """What tells a log from others in notes: 16 hexadecimal digits of its writer's key's hash."""
    return hashlib.sha256(LABEL + public).hexdigest()[:16]


def told_heads(heads: Iterable[tuple[str, Head]]) -> str:
    """Heads of several logs, as one text for all who wrote them: each log's name and hash.

    Without the number: how long a site's log is concerns no other site.
    """
    return " ".join(sorted({f"{name}:{head.hash}" for name, head in heads}))


def heads_told(text: str, name: str) -> tuple[str, ...]:
    """The hashes that ``told_heads`` tells of one log; what is no hash is passed over."""
    parted = (word.partition(":") for word in text.split())
    return tuple(told for log, _, told in parted if log == name and HASH.fullmatch(told))


def parse_note(text: str) -> tuple[str, Head] | None:
    """Read what ``AuditLog.note`` wrote: a log's name and head; None for anything else."""
    found = _NOTE.fullmatch(text)
    return (found[1], Head(int(found[2]), found[3])) if found else None


@dataclass(frozen=True)
class Entry:
    """One line: its number, kind, what it says, and the chain's hashes."""

    seq: int
    kind: str
    time: str
    body: Mapping[str, Value]
    previous: str
    hash: str


class AuditLog:
    """The log in one file; several processes may write to it.

    Args:
        path: the file; made with mode 0600 at the first entry. Its folder must exist.
        identity: signs the head.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._identity = identity

    def append(self, kind: str, **body: Value) -> Head:
        """Write one entry, durably.

        A last line that a kill cut short is no entry: it is taken off, and a ``recovered`` entry
        says that it was there.

        Raises:
            AuditLogDamaged: the end of the file is not a log's, or it cannot be written.
        """
        if _FIXED & body.keys():
            raise ValueError("an entry's fixed fields are not its body")
        with self._locked() as file:
            head, torn = _last(file)
            if torn:
                head = _write(file, head, "recovered", {"bytes": torn})
            return _write(file, head, kind, body)

    def sign(self) -> Head:
        """Write an entry that signs everything before it."""
        with self._locked() as file:
            head, torn = _last(file)
            if torn:
                head = _write(file, head, "recovered", {"bytes": torn})
            signature = self._identity.sign(SIGN_LABEL, u64(head.seq), head.hash.encode())
            body = {"key": self._identity.public.hex(), "signature": signature.hex()}
            return _write(file, head, "signed", body)

    def note(self, head: Head) -> str:
        """What the other side is told of a head, for ``parse_note``."""
        return f"{name_of(self._identity.public)}:{head}"

    def entries(self) -> Iterator[Entry]:
        """Its entries, oldest first; a last line that a kill cut short is none.

        Raises:
            AuditLogDamaged: at the first line that does not fit.
        """
        if self._path.exists():
            yield from _read(line for line in _lines(self._path) if line.endswith(b"\n"))

    def head(self) -> Head:
        """The head; ``EMPTY`` where nothing was written yet."""
        if not self._path.exists():
            return EMPTY
        with self._locked() as file:
            return _last(file)[0]

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with locked(self._path) as handle, os.fdopen(handle, "r+b", closefd=False) as file:
                yield file
        except OSError as error:
            raise _damaged("It cannot be read or written.") from error


def _write(file: BinaryIO, head: Head, kind: str, body: Mapping[str, Value]) -> Head:
    now = utc.timestamp()
    full = {**body, "kind": kind, "previous": head.hash, "seq": head.seq + 1, "time": now}
    digest = _hash(full)
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
            raise _damaged("Its last line is incomplete.")
        file.truncate(start + end)
    lines = tail[:end].splitlines()
    if not lines:
        return EMPTY, torn
    entry = _parse(lines[-1])
    if entry is None or _hash(_full(entry)) != entry.hash:
        raise _damaged("The hash of its last line is wrong.")
    return Head(entry.seq, entry.hash), torn


def read(path: Path) -> Iterator[Entry]:
    """Give the entries of a sound log, oldest first.

    Raises:
        AuditLogDamaged: at the first line that does not fit.
    """
    yield from _read(_lines(path))


def holds_entries(path: Path) -> bool:
    """Whether any line of a file is an entry as it is written, sound or not.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while line := file.readline(2 * MAX_LINE):
            if _parse(line) is not None:
                return True
    return False


def _read(lines: Iterable[bytes]) -> Iterator[Entry]:
    head = EMPTY
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is None or _hash(_full(entry)) != entry.hash or entry.seq != head.seq + 1:
            raise _damaged(f"Line {number} was changed; 'cloister verify' lists all errors.")
        if entry.previous != head.hash:
            raise _damaged(f"Line {number} does not follow the line before it.")
        head = Head(entry.seq, entry.hash)
        yield entry


@dataclass(frozen=True)
class Finding:
    """Something wrong: the line of the file (1-based; 0 for the whole) and what, in words."""

    line: int
    what: str


@dataclass(frozen=True)
class _Place:
    hash: str
    line: int


@dataclass(frozen=True)
class Verdict:
    """What ``examine`` found.

    Attributes:
        entries: lines that are entries.
        head: the last sound entry.
        signed: number of the last entry that a valid signature covers.
        keys: public keys that signed, hexadecimal.
        findings: all that is wrong, by line; what concerns no single line stands last.
    """

    entries: int
    head: Head
    signed: int
    keys: tuple[str, ...]
    findings: tuple[Finding, ...]


def examine(path: Path, *, key: bytes | None = None, peer: Path | None = None) -> Verdict:
    """Look for every line that was edited, deleted, inserted or moved.

    Args:
        path: the log.
        key: the writer's public key, 32 bytes; else any key that signs is taken, and told.
        peer: the other side's log, whose notes of this log's heads must fit.

    Raises:
        AuditLogDamaged: a file cannot be read.
    """
    findings: list[Finding] = []
    known: dict[int, _Place] = {}
    keys: list[str] = []
    head, signed, count = EMPTY, 0, 0
    for number, line in enumerate(_lines(path), start=1):
        entry = _parse(line)
        if entry is None:
            findings.append(Finding(number, "is not an entry of an audit log"))
            continue
        count += 1
        if not line.endswith(b"\n"):
            findings.append(Finding(number, f"entry {entry.seq} is incomplete: it was cut short"))
        if _hash(_full(entry)) != entry.hash:
            findings.append(Finding(number, f"entry {entry.seq} was edited"))
        findings += _order(number, entry, head, known)
        if entry.kind == "signed":
            if _signature_holds(entry, key):
                keys.append(str(entry.body["key"]))
                signed = max(signed, entry.seq - 1)
            else:
                findings.append(Finding(number, f"entry {entry.seq} is not validly signed"))
        known.setdefault(entry.seq, _Place(entry.hash, number))
        if entry.seq > head.seq:
            head = Head(entry.seq, entry.hash)
    if peer is not None:
        writers = [key] if key is not None else [bytes.fromhex(told) for told in keys]
        findings += _against(peer, {name_of(writer) for writer in writers}, known)
    findings.sort(key=lambda found: (found.line == 0, found.line))
    return Verdict(count, head, signed, tuple(dict.fromkeys(keys)), tuple(findings))


def _order(number: int, entry: Entry, head: Head, known: Mapping[int, _Place]) -> Iterator[Finding]:
    if entry.seq in known:
        first = known[entry.seq].line
        what = f"entry {entry.seq} appears again: it was inserted here or in line {first}"
        yield Finding(number, what)
    elif entry.seq <= head.seq:
        yield Finding(number, f"entry {entry.seq} comes after entry {head.seq}: it was moved")
    elif entry.seq > head.seq + 1:
        gone = f"{head.seq + 1} to {entry.seq - 1}" if entry.seq > head.seq + 2 else head.seq + 1
        yield Finding(number, f"before entry {entry.seq}, entry {gone} is missing or was moved")
    elif entry.previous != head.hash:
        before = known.get(head.seq)
        at = f", in line {before.line}; one of the two was changed" if before else ""
        yield Finding(number, f"entry {entry.seq} does not follow the entry before it{at}")


def _against(peer: Path, names: set[str], known: Mapping[int, _Place]) -> Iterator[Finding]:
    if not names:
        yield Finding(
            0, "no entry is signed: --key is needed to compare it with the other side's log"
        )
        return
    noted = 0
    for number, line in enumerate(_lines(peer), start=1):
        entry = _parse(line)
        told = parse_note(str(entry.body.get("peer_head"))) if entry is not None else None
        if told is None or told[0] not in names:
            continue
        noted += 1
        head = told[1]
        if head.seq not in known:
            yield Finding(
                0, f"the other side recorded entry {head.seq} (its line {number}); it is missing"
            )
        elif known[head.seq].hash != head.hash:
            what = f"the other side recorded another entry {head.seq} (its line {number})"
            yield Finding(known[head.seq].line, what)
    if not noted:
        yield Finding(0, "the other side recorded no log with this signature")


def _signature_holds(entry: Entry, key: bytes | None) -> bool:
    try:
        public = bytes.fromhex(str(entry.body["key"]))
        signature = bytes.fromhex(str(entry.body["signature"]))
    except (KeyError, ValueError):
        return False
    if key is not None and public != key:
        return False
    return verify(public, signature, SIGN_LABEL, u64(entry.seq - 1), entry.previous.encode())


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except OSError as error:
        raise _damaged("It cannot be read.") from error


def _parse(line: bytes) -> Entry | None:
    full = parse_canonical(line.removesuffix(b"\n"))
    if full is None:
        return None
    try:
        entry = Entry(
            full["seq"],
            full["kind"],
            full["time"],
            {name: value for name, value in full.items() if name not in _FIXED},
            full["previous"],
            full["hash"],
        )
    except KeyError:
        return None
    words = (entry.kind, entry.time, entry.previous, entry.hash)
    sound = type(entry.seq) is int and 0 < entry.seq < 2**63
    return entry if sound and all(isinstance(word, str) for word in words) else None


def _full(entry: Entry) -> dict[str, Value]:
    return {
        **entry.body,
        "kind": entry.kind,
        "previous": entry.previous,
        "seq": entry.seq,
        "time": entry.time,
    }


def _hash(full: Mapping[str, Value]) -> str:
    return entry_hash(LABEL, canonical_json(full))


def _damaged(why: str) -> AuditLogDamaged:
    return AuditLogDamaged(
        "The audit log cannot be trusted.",
        why=why,
        remedy="Keep the file, find out who changed it, and compare it with the other side's: "
        "cloister verify LOG --against OTHER_LOG",
    )
