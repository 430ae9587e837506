"""Audit log of a site, in words: what was asked of it, and what left it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cloister_fl.audit_log import AuditLog, Entry, is_begun, read
from cloister_fl.client.site.folder import Site
from cloister_fl.system.text import counted

_Told = TypeVar("_Told")

FILE = "audit.jsonl"

WHY: Mapping[str, str] = {
    "prepared": "it takes part; tells nothing of its data",
    "exchanged": "keys, sealed shares and masked vectors of secure aggregation",
    "update": "a model update; the site's policy allows it unmasked",
    "evaluated": "counts of patients by score, or by Dice coefficient; the site's policy allows "
    "them, charged or without privacy",
    "finished": "it heard that a run has ended; tells nothing of what follows from that",
    "refusal": "a reason of the closed list",
}
"""Why a message of each kind may leave; no other kind leaves."""


@dataclass(frozen=True)
class Left:
    """What left the site under one kind of message.

    Attributes:
        message: the kind.
        count: how many messages.
        bytes: their payload.
        why: why it may leave.
    """

    message: str
    count: int
    bytes: int
    why: str


def log_of(site: Site) -> AuditLog:
    """The site's log, signed with its identity."""
    return AuditLog(path_of(site), site.identity())


def path_of(site: Site) -> Path:
    """The log's file."""
    return site.audit / FILE


def entries_of(site: Site) -> tuple[Entry, ...]:
    """All entries; none where nothing was ever asked.

    Raises:
        AuditLogDamaged: the log is not sound.
    """
    path = path_of(site)
    return tuple(read(path)) if is_begun(path) else ()


def what_left(entries: tuple[Entry, ...], *, run: str | None = None) -> tuple[Left, ...]:
    """Sum up what was sent, by kind of message and reason; in one run, or in all."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        if entry.kind == "sent" and run in {None, entry.body.get("run")}:
            key = (str(entry.body.get("message")), str(entry.body.get("why")))
            counts[key] += 1
            size = entry.body.get("bytes")
            sizes[key] += size if isinstance(size, int) else 0
    return tuple(Left(key[0], counts[key], sizes[key], key[1]) for key in sorted(counts))


@dataclass(frozen=True)
class Judged:
    """A decision on a study.

    Attributes:
        time: when, ISO 8601.
        study: its hash.
        decision: approved, denied, or pending where an approval was taken back.
        by: ``steward`` or ``policy``.
        why: on what ground the policy did; a steward's words are not in the log.
        data: SHA-256 of the manifest of the data that the steward looked at; empty where nobody
            did.
    """

    time: str
    study: str
    decision: str
    by: str
    why: str
    data: str


@dataclass(frozen=True)
class Frozen:
    """Data that were frozen for a study.

    Attributes:
        time: when, ISO 8601.
        study: its hash.
        images: how many.
        sha256: of the manifest.
        why: the steward's reason for freezing them again; empty the first time.
    """

    time: str
    study: str
    images: int
    sha256: str
    why: str


@dataclass(frozen=True)
class Quarantine:
    """A decision on a quarantined file.

    Attributes:
        time: when, ISO 8601.
        file: the file's short id, which ``cloister client quarantine`` lists.
        decision: released or kept.
        held_for: code of the reason for which it was quarantined; empty where it no longer was.
        why: the steward's reason.
    """

    time: str
    file: str
    decision: str
    held_for: str
    why: str


def judged(entries: tuple[Entry, ...]) -> tuple[Judged, ...]:
    """All decisions on studies, oldest first."""
    keys = ("study", "decision", "by", "why", "data")
    return tuple(
        Judged(one.time, *(_word(one, key) for key in keys))
        for one in entries
        if one.kind == "judged"
    )


def frozen(entries: tuple[Entry, ...]) -> tuple[Frozen, ...]:
    """All data that were frozen, oldest first."""
    found = []
    for one in entries:
        if one.kind == "frozen":
            images = one.body.get("images")
            count = images if isinstance(images, int) else 0
            study, sha256, why = (_word(one, key) for key in ("study", "sha256", "why"))
            found.append(Frozen(one.time, study, count, sha256, why))
    return tuple(found)


def quarantine(entries: tuple[Entry, ...]) -> tuple[Quarantine, ...]:
    """All decisions on quarantined files, oldest first."""
    keys = ("file", "decision", "held_for", "why")
    return tuple(
        Quarantine(one.time, *(_word(one, key) for key in keys))
        for one in entries
        if one.kind == "quarantine"
    )


def _word(entry: Entry, key: str) -> str:
    return str(entry.body.get(key, ""))


def as_dict(site: Site, entries: tuple[Entry, ...]) -> dict[str, object]:
    """What ``render`` says, ready for JSON."""
    return {
        "site": site.name,
        "entries": len(entries),
        "first": entries[0].time if entries else "",
        "last": entries[-1].time if entries else "",
        "asked": sum(entry.kind == "asked" for entry in entries),
        "left": [asdict(left) for left in what_left(entries)],
        "judged": [asdict(one) for one in judged(entries)],
        "frozen": [asdict(one) for one in frozen(entries)],
        "quarantine": [asdict(one) for one in quarantine(entries)],
    }


def render(site: Site, entries: tuple[Entry, ...]) -> str:
    """The log in words, for a terminal."""
    if not entries:
        return f"Site {site.name}: no request yet, and nothing left."
    asked = sum(entry.kind == "asked" for entry in entries)
    lines = [
        f"Site {site.name}: what left it",
        f"  from {entries[0].time} to {entries[-1].time}, {asked} requests",
    ]
    lines += [
        f"  {left.count:>6} x {left.message:<10} {left.bytes:>14,} bytes  {left.why}"
        for left in what_left(entries)
    ]
    lines += _section("Decisions on studies", judged(entries), _judged_line)
    lines += _section("Data frozen for studies", frozen(entries), _frozen_line)
    lines += _section("Decisions on quarantined files", quarantine(entries), _quarantine_line)
    lines.append("Nothing else left through Cloister. The log is consistent in itself. To see")
    lines.append("whether its end was cut off, compare it with the coordinator's: cloister verify.")
    return "\n".join(lines)


def _section(title: str, found: Sequence[_Told], line: Callable[[_Told], str]) -> list[str]:
    return [title, *(f"  {line(one)}" for one in found)] if found else []


def _judged_line(one: Judged) -> str:
    told = f"{one.time}  {one.study[:16]} {one.decision} by the {one.by or 'steward'}"
    told += f", with the data {one.data[:16]}" if one.data else ""
    return told + (f": {one.why}" if one.why else "")


def _frozen_line(one: Frozen) -> str:
    told = f"{one.time}  {one.study[:16]} {counted(one.images, 'image')}, data {one.sha256[:16]}"
    return told + (f"; again: {one.why}" if one.why else "")


def _quarantine_line(one: Quarantine) -> str:
    held = f" ({one.held_for})" if one.held_for else ""
    return f"{one.time}  {one.file} {one.decision}{held}: {one.why}"
