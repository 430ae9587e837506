"""Privacy ledgers of the sites, as the coordinator's audit log knows them, each by a name alone.

A site that comes with another ledger than before has forgotten what its patients spent, or counts
other patients. It takes part again once the coordinator's steward has asked the hospital, and says
so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cloister_fl.audit_log import Entry

LEDGER, LEDGER_CHANGED, LEDGER_ACCEPTED = "ledger", "ledger-changed", "ledger-accepted"
"""Kinds of the log's entries: the first that a site came with, another one, and the steward's
word on that."""


@dataclass(frozen=True)
class KnownLedger:
    """What is known of a site's ledger; names of 64 hexadecimal digits.

    Attributes:
        accepted: the one that it may come with.
        offered: another one that it came with last; empty where there is none.
    """

    accepted: str
    offered: str = ""


def known_ledgers(entries: Iterable[Entry]) -> dict[str, KnownLedger]:
    """What the entries of the coordinator's audit log, in order, say of each site."""
    known: dict[str, KnownLedger] = {}
    for entry in entries:
        site, ledger = str(entry.body.get("site")), str(entry.body.get("ledger"))
        if entry.kind in {LEDGER, LEDGER_ACCEPTED}:
            known[site] = KnownLedger(ledger)
        elif entry.kind == LEDGER_CHANGED and site in known:
            known[site] = replace(known[site], offered=ledger)
    return known
