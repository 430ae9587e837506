"""Heads of the sites' audit logs that the coordinator recorded, to be sent back to each site.

Each message of a site names the newest entry of its log and the entry that its message before
named, both by their hashes alone. So the coordinator knows which recorded entries others are known
to follow: what nothing follows yet, it tells the site at the start of the next run, and a site
whose log lacks one takes no part. A log that was rolled back goes on from an older entry; then the
newest entry of before the roll-back has nothing behind it, and stays among those that are told. A
site that answers that it takes part has found all of them in its log: its newest entry follows
them.

Only a note that came from a site's own node counts: a hospital that tells of another's log would
keep that one out of the next run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cloister_fl.audit_log import Entry, Noted, name_of, parse_note, told_heads
from cloister_fl.membership.roster import Roster
from cloister_fl.protocol.round_messages import Prepare, Prepared

_SEATS = re.compile(r"(\d+)=(\S+)")
_SEATING = {"began", "seated"}
COMPARES = "compares"
"""In an entry ``sent``: the sites were told what their logs must hold."""
_MOST = 8
"""Most entries that are told of one log; a site that lacks one of them is refused already."""


class Followed:
    """What one site said of its log, in order.

    Attributes:
        ends: hashes of the entries that no other is known to follow, oldest first.
        rollbacks: how often the log went on from an entry that another one followed already, as
            after a roll-back.
    """

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.rollbacks = 0
        self._bases: set[str] = set()

    def add(self, note: Noted, *, holds_all: bool) -> None:
        """Take what a message said.

        Args:
            note: of the site's own log.
            holds_all: whether the site said with it that its log holds all of ``ends``.
        """
        self.rollbacks += note.base in self._bases
        if note.base:
            self._bases.add(note.base)
        kept = [] if holds_all else [one for one in self.ends if one not in {note.base, note.hash}]
        # Of too many the oldest stay: they are what somebody who rolled the log back would lose.
        self.ends = [*kept[: _MOST - 1], note.hash]


def heads_of_sites(entries: Iterable[Entry], roster: Roster, seats: Mapping[int, str]) -> str:
    """What each site's log must hold by now, as ``audit_log.told_heads`` writes it.

    Args:
        entries: the coordinator's audit log.
        roster: the federation's.
        seats: site by node, of those that no entry names yet.
    """
    kept = tuple(entry for entry in entries if entry.kind in {*_SEATING, "received", "sent"})
    sites = {str(node): site for node, site in seats.items()}
    for entry in kept:
        if entry.kind in _SEATING:
            sites.update(seats_in(entry))
    names = {entry.site: name_of(entry.public_key) for entry in roster.entries}
    return told_heads(
        (name, end)
        for (site, name), log in followed(kept, sites).items()
        if names.get(site) == name
        for end in log.ends
    )


def followed(entries: Iterable[Entry], sites: Mapping[str, str]) -> dict[tuple[str, str], Followed]:
    """What the sites said of their logs, by the site that said it and the log's name.

    Args:
        entries: the coordinator's audit log.
        sites: site by node.
    """
    told: frozenset[str] = frozenset()
    found: dict[tuple[str, str], Followed] = {}
    for entry in entries:
        body = entry.body
        if entry.kind == "sent" and body.get("message") == Prepare.kind:
            nodes = frozenset(str(body.get("nodes")).split())
            told = told | nodes if body.get(COMPARES) else told - nodes
        elif entry.kind == "received":
            node, note = str(body.get("node")), parse_note(str(body.get("peer_head")))
            if note is not None and node in sites:
                # A yes without the question, as where no list of sites is at hand, says nothing.
                holds_all = body.get("message") == Prepared.kind and node in told
                log = found.setdefault((sites[node], note.name), Followed())
                log.add(note, holds_all=holds_all)
    return found


def seats_in(entry: Entry) -> list[tuple[str, str]]:
    """Node and site of an entry ``began`` or ``seated``, as ``Participants.seats`` wrote them."""
    return _SEATS.findall(str(entry.body.get("sites")))
