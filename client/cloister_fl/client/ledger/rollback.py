"""Rollback detection of the ledger: its head, compared with heads noted outside it.

An older copy of a ledger is sound, only shorter. So whenever the ledger reserves or spends, its
head is noted in two other places: the file ``ledger.high`` beside it, and the site's audit log,
which is chained and signed. The coordinator notes the audit log's heads, and says at the start of
each run which it noted, so a folder that was rolled back as a whole is found as well. A ledger that
does not hold a noted head was rolled back or replaced, and trains nothing until the steward
confirms.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from cloister_fl.audit_log import Head, heads_told, name_of
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import log_of, path_of
from cloister_fl.client.site.folder import Site
from cloister_fl.encoding.hash_chain import HASH
from cloister_fl.errors import AuditLogDamaged, LedgerRolledBack
from cloister_fl.system.file_lock import locked
from cloister_fl.system.files import write_atomic

FILE = "ledger.high"
NOTE = "ledger"
"""Kind of the audit log's entries that note a head."""

CLAIMED = "audit.claimed"
"""Holds the hash of an entry that the coordinator noted of the audit log, and that is not in it."""

_DENY = "deny HASH --why '...'"
_IS_NOTE = f'"kind":"{NOTE}"'.encode()
_IS_ACCEPTED = b'"kind":"accepted"'


def require_newest(site: Site) -> None:
    """Refuse a ledger that lacks what was noted of it; before anything is read or charged.

    Raises:
        LedgerRolledBack: it was rolled back, replaced or removed, or the notes are missing.
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
        AuditLogDamaged: the log cannot be read.
    """
    found = disagreements(site)
    if found:
        raise LedgerRolledBack(
            "The privacy ledger does not match ledger.high or the audit log.",
            why=" ".join(found),
            remedy="Restore the newest ledger.sqlite. If it is lost, deny each approved study: "
            f"{site.command(_DENY)}. Then accept the ledger: "
            + site.command("budget accept-ledger"),
        )


def compare(site: Site, heads: str) -> None:
    """Keep in mind what the coordinator noted of this site's audit log, where the log lacks it.

    A coordinator that lies can only keep the site out of its own runs, until the steward accepts.

    Args:
        site: the site.
        heads: what the coordinator said, see ``audit_log.told_heads``.

    Raises:
        AuditLogDamaged: the log cannot be read.
        OutputInTheWay: what it noted cannot be kept.
    """
    for digest in heads_told(heads, name_of(site.identity().public)):
        if not _in_log(site, digest):
            write_atomic(site.root / CLAIMED, digest.encode())


def disagreements(site: Site) -> tuple[str, ...]:
    """What is wrong between the ledger and its notes, a sentence each; empty where all fits."""
    entries: dict[int, str] = {}
    reserved = False
    if site.ledger.exists():
        found_there = Ledger.open(site.ledger, delta=site.policy.ledger_delta).entries()
        entries = {entry.seq: entry.hash for entry in found_there}
        reserved = any(entry.kind == "reserved" for entry in found_there)
    found = []
    for where, noted in ((FILE, _high(site)), ("The audit log", _noted(site))):
        if noted is None:
            if reserved:
                found.append(f"{where} has no head of the ledger.")
        elif noted.seq not in entries:
            found.append(f"{where} has entry {noted.seq}; the ledger ends at entry {len(entries)}.")
        elif entries[noted.seq] != noted.hash:
            found.append(f"{where} has another entry {noted.seq} than the ledger.")
    if _claimed(site):
        found.append("The coordinator has an entry of the audit log that the log itself lacks.")
    return tuple(found)


def note(site: Site, ledger: Ledger) -> None:
    """Note the ledger's head outside it; call it after each entry that reserves or spends.

    Raises:
        OutputInTheWay: ``ledger.high`` cannot be written.
        AuditLogDamaged: the log cannot be written.
    """
    with locked(site.root / f".{FILE}.lock"):
        # The head is read under the lock, so that a slower process never notes an older one last.
        seq, digest = ledger.head()
        write_atomic(site.root / FILE, json.dumps({"seq": seq, "hash": digest}).encode())
        log_of(site).append(NOTE, ledger_seq=seq, ledger_hash=digest)


def is_noted(site: Site) -> bool:
    """Whether both places note a head; see ``note``."""
    return _high(site) is not None and _noted(site) is not None


def accept(site: Site) -> tuple[str, ...]:
    """Take the ledger as it is for the newest, on the steward's word, and note that.

    Returns:
        What did not fit, as in ``disagreements``; nothing is written where all fits.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
        AuditLogDamaged, OutputInTheWay: see ``note``.
    """
    found = disagreements(site)
    if found:
        missed = max((head.seq for head in (_high(site), _noted(site)) if head), default=0)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        ledger.accept(missed, site.identity())
        log_of(site).append(
            "accepted", by="steward", why=" ".join(found), claimed=_claimed(site) or None
        )
        note(site, ledger)
        (site.root / CLAIMED).unlink(missing_ok=True)
    return found


def _high(site: Site) -> Head | None:
    try:
        return _head(json.loads((site.root / FILE).read_bytes()), "seq", "hash")
    except (OSError, ValueError):
        return None


def _noted(site: Site) -> Head | None:
    """The highest head in the audit log since the steward last accepted a ledger.

    Not the last one: a lower note that somebody wrote behind it takes nothing back. The log's
    chain is for ``cloister verify`` to judge.
    """
    highest: Head | None = None
    try:
        for line in _lines(site):
            if _IS_ACCEPTED in line:
                highest = None
            elif _IS_NOTE in line and line.endswith(b"\n"):
                head = _head(json.loads(line), "ledger_seq", "ledger_hash")
                if head is not None and (highest is None or head.seq >= highest.seq):
                    highest = head
    except ValueError:
        return None
    return highest


def _claimed(site: Site) -> str:
    """What ``compare`` kept and the log still lacks; empty where there is nothing."""
    try:
        digest = (site.root / CLAIMED).read_text("ascii")
    except (OSError, ValueError):
        return ""
    return digest if HASH.fullmatch(digest) and not _in_log(site, digest) else ""


def _in_log(site: Site, digest: str) -> bool:
    """Whether an entry has this hash, or the steward accepted that none has."""
    sought = (f'"hash":"{digest}"'.encode(), f'"claimed":"{digest}"'.encode())
    return any(one in line for line in _lines(site) for one in sought)


def _lines(site: Site) -> Iterator[bytes]:
    path = path_of(site)
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise AuditLogDamaged(
            f"The audit log {path.name} cannot be read.",
            why=f"{error.strerror or 'The system gave no reason'}.",
            remedy=f"Check the permissions of {shlex.quote(str(path))}, or restore it from the "
            "site's backup.",
        ) from None


def _head(held: object, seq: str, digest: str) -> Head | None:
    if not isinstance(held, dict):
        return None
    number, text = held.get(seq), str(held.get(digest))
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return None
    return Head(number, text) if HASH.fullmatch(text) else None
