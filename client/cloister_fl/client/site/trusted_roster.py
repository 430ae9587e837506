"""The roster that this site trusts: the one its steward accepted, and no other.

The coordinator's root signs a roster, but a coordinator that lies can enrol sites of its own. So
a site takes part only with the roster whose digest its steward compared with the other sites'
stewards; any change waits for the steward again.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.encoding.framing import FrameError, Reader, frame
from cloister_fl.errors import FileUnreadable, RosterInvalid, RosterMismatch
from cloister_fl.membership.identity import KEY_BYTES
from cloister_fl.membership.roster import Roster, RosterChange, compare, open_roster
from cloister_fl.system.files import write_atomic

_LABEL = b"cloister/pin/v1"


@dataclass(frozen=True)
class Offer:
    """A signed roster that someone offers, and how it differs from the pinned one, if any."""

    roster: Roster
    change: RosterChange | None


def read_pin(path: Path) -> Roster:
    """Return the pinned roster.

    Raises:
        RosterMismatch: no roster was accepted here.
        FileUnreadable: the file cannot be read.
        RosterInvalid: it is damaged.
    """
    return _read(path)[1]


def examine(path: Path, signed: bytes, root: bytes) -> Offer:
    """What a steward is shown before accepting a roster.

    Args:
        path: the site's pin; need not exist yet.
        signed: the roster file as the coordinator offers it.
        root: the public key of the federation's root, 32 bytes.

    Raises:
        RosterInvalid: the file is malformed or not signed by that root.
        RosterMismatch: the pinned roster is another federation's, or has another root; or the
            offered one is older.
    """
    roster = open_roster(signed, root)
    if not path.exists():
        return Offer(roster, None)
    pinned_root, pinned = _read(path)
    if not hmac.compare_digest(pinned_root, root) or pinned.federation != roster.federation:
        raise RosterMismatch(
            "The roster is another federation's than the pinned one.",
            remedy="Use a site folder for each federation, or ask the coordinator what changed.",
        )
    change = compare(pinned, roster)
    if change.rolled_back:
        raise RosterMismatch(
            "The roster offered is not newer than the pinned one, and differs from it.",
            why="An old roster would bring back a site or a key that was removed.",
            remedy="Ask the coordinator for the present roster.",
        )
    return Offer(roster, change)


def accept(path: Path, signed: bytes, root: bytes, *, confirmed: bytes) -> Roster:
    """Pin a roster; the steward's act.

    Args:
        path: the site's pin, replaced atomically.
        signed: see ``examine``.
        root: see ``examine``.
        confirmed: the digest that the steward compared out of band, 32 bytes.

    Raises:
        RosterInvalid, RosterMismatch: see ``examine``; or the digest is not the roster's.
    """
    roster = examine(path, signed, root).roster
    if not hmac.compare_digest(roster.digest, confirmed):
        raise RosterMismatch(
            "The roster offered does not have the confirmed digest.",
            remedy="Compare the digest with the other sites again; do not accept this roster.",
        )
    write_atomic(path, frame(_LABEL, root, signed))
    return roster


def _read(path: Path) -> tuple[bytes, Roster]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RosterMismatch(
            "No roster is pinned at this site.",
            why="Updates leave only masked, for the sites on a roster that the steward accepted.",
            remedy="Accept the federation's roster first.",
        ) from None
    except OSError:
        raise FileUnreadable(
            f"{path.name} cannot be read.", remedy="Check the file's permissions."
        ) from None
    try:
        reader = Reader(data)
        if reader.field() != _LABEL:
            raise FrameError("another label")
        root, signed = reader.field(KEY_BYTES), reader.field()
        reader.end()
    except FrameError:
        raise RosterInvalid(
            "The pinned roster is damaged.", remedy="Restore it, or accept the roster again."
        ) from None
    return root, open_roster(signed, root)
