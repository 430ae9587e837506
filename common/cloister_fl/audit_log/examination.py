"""Examination of an audit log: every line that was edited, deleted, inserted or moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.audit_log.heads import name_of, parse_note
from cloister_fl.audit_log.log import (
    EMPTY,
    SIGN_LABEL,
    Entry,
    Head,
    hash_of,
    is_unsalted,
    lines_of,
    parse,
    whole,
)
from cloister_fl.encoding.framing import u64
from cloister_fl.membership.identity import verify


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
        peer: the other side's log: each entry that it noted of this log must be in this one.

    Raises:
        AuditLogDamaged: a file cannot be read.
    """
    findings: list[Finding] = []
    known: dict[int, _Place] = {}
    keys: list[str] = []
    head, signed, count = EMPTY, 0, 0
    for number, line in enumerate(lines_of(path), start=1):
        entry = parse(line)
        if entry is None:
            findings.append(Finding(number, _no_entry(line)))
            continue
        count += 1
        if not line.endswith(b"\n"):
            findings.append(Finding(number, f"entry {entry.seq} is incomplete: it was cut short"))
        if hash_of(whole(entry)) != entry.hash:
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
        lines = {place.hash: place.line for place in known.values()}
        findings += _against(peer, {name_of(writer) for writer in writers}, lines)
    findings.sort(key=lambda found: (found.line == 0, found.line))
    return Verdict(count, head, signed, tuple(dict.fromkeys(keys)), tuple(findings))


def _no_entry(line: bytes) -> str:
    if is_unsalted(line):
        return "has no salt, as an entry of an earlier version of Cloister"
    return "is not an entry of an audit log"


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


def _against(peer: Path, names: set[str], lines: Mapping[str, int]) -> Iterator[Finding]:
    """What the other side noted, and is not there.

    Args:
        peer: the other side's log.
        names: of the log that is examined.
        lines: of this log's file, by the hash of their entry.
    """
    if not names:
        yield Finding(
            0, "no entry is signed: --key is needed to compare it with the other side's log"
        )
        return
    noted, before = 0, 0
    missing: set[str] = set()
    for number, line in enumerate(lines_of(peer), start=1):
        entry = parse(line)
        told = parse_note(str(entry.body.get("peer_head"))) if entry is not None else None
        if told is None or told.name not in names:
            continue
        noted += 1
        for digest in (told.base, told.hash):
            if digest in lines:
                before = max(before, lines[digest])
            elif digest and digest not in missing:
                missing.add(digest)
                where = f"after line {before} of this log" if before else "before any of this log"
                what = (
                    f"the other side recorded an entry {where} (its line {number}); it is missing"
                )
                yield Finding(0, what)
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
