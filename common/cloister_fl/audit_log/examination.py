"""Examination of an audit log: every line that was edited, deleted, inserted or moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.audit_log.entries import (
    EMPTY,
    MAX_LINE,
    SIGN_LABEL,
    SIGNED,
    Entry,
    Head,
    hash_of,
    is_unsalted,
    parse,
    whole,
)
from cloister_fl.audit_log.heads import name_of, parse_note
from cloister_fl.audit_log.segments import Part, number_of, number_told, parts, segment_path
from cloister_fl.encoding.framing import u64
from cloister_fl.membership.identity import verify


@dataclass(frozen=True)
class Finding:
    """Something wrong: the line of the file (1-based; 0 for the whole) and what, in words.

    Attributes:
        file: name of the sealed segment whose line it is; empty for the file that was named.
    """

    line: int
    what: str
    file: str = ""

    @property
    def where(self) -> str:
        """File and line, as text before ``what``; empty where it concerns no single line."""
        if not self.line:
            return ""
        return f"{self.file} line {self.line}: " if self.file else f"line {self.line}: "


@dataclass(frozen=True)
class _Place:
    hash: str
    line: int
    file: str

    def __str__(self) -> str:
        return f"line {self.line} of {self.file}" if self.file else f"line {self.line}"


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
        peer: the other side's log: each entry that it noted of this log must be in this one.

    Raises:
        AuditLogDamaged: a file cannot be read.
    """
    findings: list[Finding] = []
    known: dict[int, _Place] = {}
    keys: list[str] = []
    head, signed, count = EMPTY, 0, 0
    full: set[Path] = set()
    with parts(path) as found:
        findings += _missing(path, found)
        for part, (number, line) in ((one, row) for one in found for row in _rows(one)):
            entry, file = parse(line), part.path.name if part.is_sealed else ""
            if entry is None:
                findings.append(Finding(number, _no_entry(line), file))
                continue
            count += 1
            if not line.endswith(b"\n"):
                what = f"entry {entry.seq} is incomplete: it was cut short"
                findings.append(Finding(number, what, file))
            if hash_of(whole(entry)) != entry.hash:
                findings.append(Finding(number, f"entry {entry.seq} was edited", file))
            place = _Place(entry.hash, number, file)
            findings += _order(place, entry, head, known)
            if entry.kind == SIGNED:
                if _signature_holds(entry, key):
                    keys.append(str(entry.body["key"]))
                    signed = max(signed, entry.seq - 1)
                else:
                    what = f"entry {entry.seq} is not validly signed"
                    findings.append(Finding(number, what, file))
            known.setdefault(entry.seq, place)
            full.add(part.path)
            if entry.seq > head.seq:
                head = Head(entry.seq, entry.hash)
    empty = [part.path.name for part in found if part.path not in full] if len(found) > 1 else []
    findings += [Finding(0, f"{name} has no entry") for name in empty]
    if peer is not None:
        writers = [key] if key is not None else [bytes.fromhex(told) for told in keys]
        places = {place.hash: (seq, place) for seq, place in known.items()}
        findings += _against(peer, {name_of(writer) for writer in writers}, places)
    # Behind all lines, which are in their order.
    findings.sort(key=lambda found: found.line == 0)
    return Verdict(count, head, signed, tuple(dict.fromkeys(keys)), tuple(findings))


def _rows(part: Part) -> Iterator[tuple[int, bytes]]:
    return enumerate(part.lines, start=1)


def _missing(path: Path, found: Sequence[Part]) -> Iterator[Finding]:
    """The sealed segments that a log must have had, and has not; a file without a line, too."""
    numbers = {number_of(part.path) for part in found if part.is_sealed}
    with path.open("rb") as file:
        last = number_of(path) or number_told(file.readline(MAX_LINE))
    for number in range(1, max([last, *(one + 1 for one in numbers)])):
        if number not in numbers:
            base = path if number_of(path) == 0 else path.with_name(_base(path))
            name = segment_path(base, number).name
            yield Finding(0, f"the sealed segment {name} is missing")


def _base(path: Path) -> str:
    """Name of the file that is written, by that of a sealed segment."""
    return path.name.replace(f".{number_of(path):06d}", "", 1)


def _no_entry(line: bytes) -> str:
    if is_unsalted(line):
        return "has no salt, as an entry of an earlier version of Cloister"
    return "is not an entry of an audit log"


def _order(
    place: _Place, entry: Entry, head: Head, known: Mapping[int, _Place]
) -> Iterator[Finding]:
    what = ""
    if entry.seq in known:
        what = f"entry {entry.seq} appears again: it was inserted here or in {known[entry.seq]}"
    elif entry.seq <= head.seq:
        what = f"entry {entry.seq} comes after entry {head.seq}: it was moved"
    elif entry.seq > head.seq + 1:
        gone = f"{head.seq + 1} to {entry.seq - 1}" if entry.seq > head.seq + 2 else head.seq + 1
        what = f"before entry {entry.seq}, entry {gone} is missing or was moved"
    elif entry.previous != head.hash:
        before = known.get(head.seq)
        at = f", in {before}; one of the two was changed" if before else ""
        what = f"entry {entry.seq} does not follow the entry before it{at}"
    if what:
        yield Finding(place.line, what, place.file)


def _against(
    peer: Path, names: set[str], places: Mapping[str, tuple[int, _Place]]
) -> Iterator[Finding]:
    """What the other side noted, and is not there.

    Args:
        peer: the other side's log.
        names: of the log that is examined.
        places: number and place of this log's entries, by their hash.
    """
    if not names:
        yield Finding(
            0, "no entry is signed: --key is needed to compare it with the other side's log"
        )
        return
    noted, before = 0, 0
    after = "before any of this log"
    missing: set[str] = set()
    with parts(peer) as found:
        for lost in _missing(peer, found):
            yield Finding(0, f"of the other side's log {lost.what}: it was not compared")
        for part, (number, line) in ((one, row) for one in found for row in _rows(one)):
            entry = parse(line)
            told = parse_note(str(entry.body.get("peer_head"))) if entry is not None else None
            if told is None or told.name not in names:
                continue
            noted += 1
            its = f"its line {number}" + (f" of {part.path.name}" if part.is_sealed else "")
            for digest in (told.base, told.hash):
                if digest in places:
                    seq, place = places[digest]
                    if seq > before:
                        before, after = seq, f"after {_of_this(place)}"
                elif digest and digest not in missing:
                    missing.add(digest)
                    what = f"the other side recorded an entry {after} ({its}); it is missing"
                    yield Finding(0, what)
    if not noted:
        yield Finding(0, "the other side recorded no log with this signature")


def _of_this(place: _Place) -> str:
    return str(place) if place.file else f"{place} of this log"


def _signature_holds(entry: Entry, key: bytes | None) -> bool:
    try:
        public = bytes.fromhex(str(entry.body["key"]))
        signature = bytes.fromhex(str(entry.body["signature"]))
    except (KeyError, ValueError):
        return False
    if key is not None and public != key:
        return False
    return verify(public, signature, SIGN_LABEL, u64(entry.seq - 1), entry.previous.encode())
