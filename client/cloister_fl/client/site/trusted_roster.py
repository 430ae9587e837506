"""Trusted roster of a site: the one that its steward accepted, and no other.

The coordinator's root signs a roster, but a coordinator that lies can enrol sites of its own. So
a site takes part only with the roster whose digest its steward compared with the other sites'
stewards; any change waits for the steward again.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.client.site.folder import SITE_FILE, command_at
from cloister_fl.encoding.framing import FrameError, Reader, frame
from cloister_fl.errors import FileUnreadable, RosterInvalid, RosterMismatch
from cloister_fl.membership.identity import KEY_BYTES
from cloister_fl.membership.roster import Roster, RosterChange, compare, open_roster
from cloister_fl.system.files import write_atomic

_LABEL = b"cloister/pin/v1"


@dataclass(frozen=True)
class Offer:
    """A signed roster that someone offers, and how it differs from the trusted one, if any."""

    roster: Roster
    change: RosterChange | None


def read_pin(path: Path) -> Roster:
    """Return the trusted roster.

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
        RosterMismatch: the trusted roster is another federation's, or has another root; or the
            offered one is older.
    """
    roster = open_roster(signed, root)
    if not path.exists():
        return Offer(roster, None)
    trusted_root, trusted = _read(path)
    if not hmac.compare_digest(trusted_root, root) or trusted.federation != roster.federation:
        raise RosterMismatch(
            "The roster offered is for another federation than the trusted one.",
            remedy="Use a site folder for each federation, or ask the coordinator what changed.",
        )
    change = compare(trusted, roster)
    if change.rolled_back:
        raise RosterMismatch(
            "The roster offered is not newer than the trusted one, and differs from it.",
            why="An old roster would bring back a site or a key that was removed.",
            remedy="Ask the coordinator for the current roster, then look again: " + _command(path),
        )
    return Offer(roster, change)


def accept(path: Path, signed: bytes, root: bytes, *, confirmed: bytes) -> Roster:
    """Trust a roster; the steward's act.

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


def _command(path: Path) -> str:
    """The command that shows and accepts a roster, for the site that the pin belongs to."""
    return command_at(path.parent if (path.parent / SITE_FILE).exists() else None, "roster")


def _read(path: Path) -> tuple[bytes, Roster]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RosterMismatch(
            "No roster is trusted at this site.",
            why="Updates leave only by secure aggregation, with the sites on a roster that the "
            "steward accepted.",
            remedy=f"Compare and accept the federation's roster: {_command(path)}",
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
            "The trusted roster is damaged.",
            remedy=f"Restore {path.name} from the site's backup, or remove it and accept the "
            f"roster again: {_command(path)}",
        ) from None
    return root, open_roster(signed, root)
