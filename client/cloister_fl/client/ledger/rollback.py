"""Rollback detection of the ledger: its entries, compared with heads noted outside it.

An older copy of a ledger is sound, only shorter. So whenever the ledger reserves or spends, its
head is noted in two other places: the file ``ledger.high`` beside it, and the site's audit log,
which is chained and signed. The coordinator notes the audit log's heads, and says at the start of
each run which it noted, so a folder that was rolled back as a whole is found as well. A ledger that
does not hold a noted head was rolled back or replaced, and trains nothing until the steward
confirms. ``site_session`` writes the notes, and asks here what does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister_fl import audit_log
from cloister_fl.audit_log import Head
from cloister_fl.encoding.canonical_json import HASH

FILE = "ledger.high"
NOTE = "ledger"
"""Kind of the audit log's entries that note a head."""
ACCEPTED = "accepted"
"""Kind of those by which the steward takes a ledger for the newest."""

CLAIMED = "audit.claimed"
"""Holds the hash of an entry that the coordinator noted of the audit log, and that is not in it."""


@dataclass(frozen=True)
class LogNotes:
    """What a site's audit log says of its ledger.

    Attributes:
        newest: the highest head that was noted since the steward last accepted a ledger. Not the
            last one: a lower note that somebody wrote behind it takes nothing back.
        accepted: number of the entry by which the steward last did; 0 where there is none.
        claims: entries that the coordinator noted and the steward accepted as lost.
    """

    newest: Head | None = None
    accepted: int = 0
    claims: frozenset[str] = frozenset()


def notes_in(entries: Sequence[audit_log.Entry]) -> LogNotes:
    """What the entries of an audit log, in order, say of the ledger."""
    newest: Head | None = None
    accepted = 0
    claims = set()
    for entry in entries:
        if entry.kind == ACCEPTED:
            newest, accepted = None, entry.seq
            claims.add(str(entry.body.get("claimed")))
        elif entry.kind == NOTE:
            head = _head(entry.body.get("ledger_seq"), entry.body.get("ledger_hash"))
            if head is not None and (newest is None or head.seq >= newest.seq):
                newest = head
    return LogNotes(newest, accepted, frozenset(claims))


def high_of(root: Path) -> Head | None:
    """The head that ``ledger.high`` of a site folder notes; None where it says nothing."""
    try:
        held = json.loads((root / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return _head(held.get("seq"), held.get("hash")) if isinstance(held, dict) else None


def claim_of(root: Path) -> str:
    """The hash that the file ``CLAIMED`` of a site folder holds; empty where there is none."""
    try:
        digest = (root / CLAIMED).read_text("ascii")
    except (OSError, ValueError):
        return ""
    return digest if HASH.fullmatch(digest) else ""


def differences(
    hashes: Sequence[str],
    *,
    reserved: bool,
    high: Head | None,
    noted: Head | None,
    is_log_older: bool,
) -> tuple[str, ...]:
    """What is wrong between a ledger and its notes, a sentence each; empty where all fits.

    Args:
        hashes: of the ledger's entries, verified; none where there is no ledger.
        reserved: whether anything was reserved in it, so that it was noted.
        high: what ``ledger.high`` notes.
        noted: what the audit log notes.
        is_log_older: whether the coordinator noted an entry that the audit log lacks.
    """
    found = []
    for where, head in ((FILE, high), ("The audit log", noted)):
        if head is None:
            if reserved:
                found.append(f"{where} has no head of the ledger.")
        elif head.seq > len(hashes):
            found.append(f"{where} has entry {head.seq}; the ledger ends at entry {len(hashes)}.")
        elif hashes[head.seq - 1] != head.hash:
            found.append(f"{where} has another entry {head.seq} than the ledger.")
    if is_log_older:
        found.append("The coordinator has an entry of the audit log that the log itself lacks.")
    return tuple(found)


def _head(number: object, digest: object) -> Head | None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    return Head(number, str(digest)) if HASH.fullmatch(str(digest)) else None
