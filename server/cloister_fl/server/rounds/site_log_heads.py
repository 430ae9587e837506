"""Heads of the sites' audit logs that the coordinator recorded, to be sent back to each site.

Only a note that came from a site's own node counts: a hospital that tells of another's log would
keep that one out of the next run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cloister_fl.audit_log import Entry, Head, name_of, parse_note, told_heads
from cloister_fl.membership.roster import Roster

_SEATS = re.compile(r"(\d+)=(\S+)")
_SEATING = {"began", "seated"}


def heads_of_sites(entries: Iterable[Entry], roster: Roster, seats: Mapping[int, str]) -> str:
    """The newest and the highest head of each site's log, as ``audit_log.told_heads`` writes them.

    Both, because they part after a roll-back: what a site answers then is noted last, and is lower
    than what was noted before.

    Args:
        entries: the coordinator's audit log.
        roster: the federation's.
        seats: site by node, of those that no entry names yet.
    """
    kept = tuple(entry for entry in entries if entry.kind in {*_SEATING, "received"})
    sites = {str(node): site for node, site in seats.items()}
    for entry in kept:
        if entry.kind in _SEATING:
            sites.update(seats_in(entry))
    names = {entry.site: name_of(entry.public_key) for entry in roster.entries}
    newest: dict[str, Head] = {}
    highest: dict[str, Head] = {}
    for entry in kept:
        note = parse_note(str(entry.body.get("peer_head")))
        site = sites.get(str(entry.body.get("node")), "")
        if note is None or names.get(site) != note[0]:
            continue
        name, head = note
        newest[name] = head
        if name not in highest or highest[name].seq < head.seq:
            highest[name] = head
    return told_heads((*newest.items(), *highest.items()))


def seats_in(entry: Entry) -> list[tuple[str, str]]:
    """Node and site of an entry ``began`` or ``seated``, as ``Participants.seats`` wrote them."""
    return _SEATS.findall(str(entry.body.get("sites")))
