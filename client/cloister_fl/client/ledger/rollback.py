"""Rollback detection of the ledger: its entries, compared with heads noted outside it.

An older copy of a ledger is sound, only shorter. So whenever the ledger reserves or spends, its
head is noted in two other places: the file ``ledger.high`` beside it, and the site's audit log,
which is chained and signed. The coordinator notes the audit log's heads, and says at the start of
each run which it noted, so a folder that was rolled back as a whole is found as well. A ledger that
does not hold a noted head was rolled back or replaced, and trains nothing until the steward
confirms. ``site_session`` writes the notes, and asks here what does not fit.

Whoever can write the files can write notes, for neither a line of the audit log nor most entries of
the ledger are signed by themselves. So a note never takes back another one: the ledger must hold
all of them. Only the steward's acceptance does, which is an entry of the ledger, signed with the
site's key, and names the head of the audit log up to which it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister_fl import audit_log
from cloister_fl.audit_log import EMPTY, Head
from cloister_fl.client.ledger import ledger_file
from cloister_fl.encoding.canonical_json import HASH

FILE = "ledger.high"
NOTE = "ledger"
"""Kind of the audit log's entries that note a head."""
ACCEPTED = "accepted"
"""Kind of those that say that the steward took a ledger for the newest. They are for the reader:
what counts is the signed entry of the ledger, ``replay.Acceptance``."""

CLAIMED = "audit.claimed"
"""Holds the hashes of entries that the coordinator noted of the audit log, and that it lacks."""


@dataclass(frozen=True, slots=True)
class Note:
    """A head of the ledger that the audit log notes.

    Attributes:
        at: number of the entry of the audit log.
        head: number and hash of the ledger's entry.
    """

    at: int
    head: Head


@dataclass(frozen=True)
class Pins:
    """What a process has verified of a site, and must find again for as long as it lives.

    Attributes:
        signer: the site's public key when the process first met it: what the steward accepts
            meanwhile is signed with this key.
        log: last entry of the audit log that was verified or written.
        ledger: last entry of the ledger; None where there was none.
        accepted: number of the entry of the audit log up to which the steward's last acceptance in
            that ledger voids what was noted; -1 without one.
        claims: entries of the audit log that the coordinator noted, and that the log lacks.
    """

    signer: bytes
    log: Head = EMPTY
    ledger: ledger_file.Head | None = None
    accepted: int = -1
    claims: frozenset[str] = frozenset()


class LogReader:
    """What a site needs to know of its audit log, taken from one entry after another.

    Attributes:
        notes: what the entries note of the ledger, in their order.
        told: hash of the entry that the site's last answer told; empty for none. It is the entry
            of the answer, or the signature right behind it.
    """

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.told = ""
        self._is_behind_answer = False

    def see(self, entry: audit_log.Entry) -> None:
        """Take the next entry."""
        if entry.kind == "sent" or (entry.kind == "signed" and self._is_behind_answer):
            self.told = entry.hash
        self._is_behind_answer = entry.kind == "sent"
        if entry.kind == NOTE:
            head = _head(entry.body.get("ledger_seq"), entry.body.get("ledger_hash"))
            if head is not None:
                self.notes.append(Note(entry.seq, head))


def lacking(hashes: Sequence[str], heads: Iterable[Head]) -> Head | None:
    """The highest of the heads that a ledger with these hashes does not hold; None for none."""
    gone = [head for head in heads if not _holds(hashes, head)]
    return max(gone, key=lambda head: head.seq, default=None)


def _holds(hashes: Sequence[str], head: Head) -> bool:
    return head.seq <= len(hashes) and hashes[head.seq - 1] == head.hash


def high_of(root: Path) -> Head | None:
    """The head that ``ledger.high`` of a site folder notes; None where it says nothing."""
    try:
        held = json.loads((root / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return _head(held.get("seq"), held.get("hash")) if isinstance(held, dict) else None


def claims_of(root: Path) -> frozenset[str]:
    """The hashes that the file ``CLAIMED`` of a site folder holds; none where there is none."""
    try:
        words = (root / CLAIMED).read_text("ascii").split()
    except (OSError, ValueError):
        return frozenset()
    return frozenset(word for word in words if HASH.fullmatch(word))


def differences(
    hashes: Sequence[str],
    *,
    reserved: bool,
    high: Head | None,
    noted: Sequence[Head],
    is_log_older: bool,
    foreign: Sequence[int] = (),
) -> tuple[str, ...]:
    """What is wrong between a ledger and its notes, a sentence each; empty where all fits.

    Args:
        hashes: of the ledger's entries, verified; none where there is no ledger.
        reserved: whether anything was reserved in it, so that it was noted.
        high: what ``ledger.high`` notes.
        noted: what the audit log notes.
        is_log_older: whether the coordinator noted an entry that the audit log lacks.
        foreign: entries of the ledger that another key than the site's signed.
    """
    found = []
    for where, heads in ((FILE, [high] if high else []), ("The audit log", noted)):
        gone = lacking(hashes, heads)
        if not heads and reserved:
            found.append(f"{where} has no head of the ledger.")
        elif gone is not None and gone.seq > len(hashes):
            found.append(f"{where} has entry {gone.seq}; the ledger ends at entry {len(hashes)}.")
        elif gone is not None:
            found.append(f"{where} has another entry {gone.seq} than the ledger.")
    if foreign:
        found.append(f"Entry {foreign[0]} of the ledger is not signed by this site.")
    if is_log_older:
        found.append("The coordinator has an entry of the audit log that the log itself lacks.")
    return tuple(found)


def _head(number: object, digest: object) -> Head | None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    return Head(number, str(digest)) if HASH.fullmatch(str(digest)) else None
