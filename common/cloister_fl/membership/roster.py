"""The roster: which sites there are, and their public keys.

The federation's root signs it for integrity. What protects is that each site *pins* the digest
that its steward confirmed out of band: otherwise a server that holds the root could enrol sites
of its own until every other summand is known to it (a Sybil attack).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cloister_fl.encoding.framing import (
    Buffer,
    FrameError,
    Reader,
    digest,
    frame,
    is_sorted_set,
    listed,
    u64,
)
from cloister_fl.errors import RosterInvalid
from cloister_fl.membership.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    usable_public_key,
    verify,
)

LABEL = "cloister/roster/v2"
MAX_SITES = 1000
SITE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, order=True)
class RosterEntry:
    """One site.

    Attributes:
        site: its id.
        public_key: Ed25519, 32 bytes.
    """

    site: str
    public_key: bytes


@dataclass(frozen=True)
class Roster:
    """The sites of a federation.

    Attributes:
        federation: its id.
        serial: rises with every change.
        entries: by rising id; ``of`` puts them in order.

    Raises:
        RosterInvalid: ids not in order, an unusable or repeated key.
    """

    federation: str
    serial: int
    entries: tuple[RosterEntry, ...]

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise RosterInvalid(
                f"The roster {fault}.", remedy="Ask the coordinator for a new roster."
            )

    @classmethod
    def of(cls, federation: str, serial: int, entries: Iterable[RosterEntry]) -> Roster:
        """Build a roster from entries in any order."""
        return cls(federation, serial, tuple(sorted(entries)))

    def encode(self) -> bytes:
        """Canonical bytes; what the root signs and ``digest`` hashes."""
        rows = (frame(entry.site.encode(), entry.public_key) for entry in self.entries)
        return frame(LABEL.encode(), self.federation.encode(), u64(self.serial), listed(rows))

    @classmethod
    def decode(cls, data: Buffer) -> Roster:
        """Read canonical bytes.

        Raises:
            RosterInvalid: they are not those of a valid roster.
        """
        try:
            reader = Reader(data)
            if reader.text() != LABEL:
                raise FrameError("another label")
            federation = reader.text()
            serial = reader.u64()
            entries = tuple(_entry(item) for item in reader.items(MAX_SITES))
            reader.end()
        except FrameError:
            raise RosterInvalid("The roster's bytes are malformed.") from None
        return cls(federation, serial, entries)

    @property
    def digest(self) -> bytes:
        """32 bytes; what a site trusts and what every key epoch is bound to."""
        return digest(LABEL, self.encode())

    @property
    def sites(self) -> tuple[str, ...]:
        """The ids, rising."""
        return tuple(entry.site for entry in self.entries)

    @functools.cached_property
    def keys(self) -> Mapping[str, bytes]:
        """The trusted key of each site."""
        return {entry.site: entry.public_key for entry in self.entries}

    def public_key(self, site: str) -> bytes | None:
        """The trusted key of a site, or ``None`` where the roster has no such site."""
        return self.keys.get(site)


def _entry(reader: Reader) -> RosterEntry:
    entry = RosterEntry(reader.text(), reader.field(KEY_BYTES))
    reader.end()
    return entry


def _fault(roster: Roster) -> str:
    keys = [entry.public_key for entry in roster.entries]
    checks = (
        (is_sorted_set(roster.sites), "names a site twice or is not sorted"),
        (
            all(SITE_ID.fullmatch(site) for site in roster.sites),
            "has a site id that is not lower-case letters, digits and hyphens",
        ),
        (len(set(keys)) == len(keys), "gives two sites one key"),
        (all(usable_public_key(key) for key in keys), "has a key that cannot be used"),
        (0 <= roster.serial < 2**64, "has an impossible serial number"),
        (bool(roster.federation), "names no federation"),
        (len(roster.entries) <= MAX_SITES, f"has more than {MAX_SITES} sites"),
    )
    return next((complaint for holds, complaint in checks if not holds), "")


def sign_roster(roster: Roster, root: Identity) -> bytes:
    """The roster and the root's signature, as one file."""
    body = roster.encode()
    return frame(body, root.sign(LABEL, body))


def open_roster(data: Buffer, root_public: bytes) -> Roster:
    """Read a signed roster file.

    Raises:
        RosterInvalid: malformed, or not signed by this federation's root.
    """
    try:
        reader = Reader(data)
        body = reader.field()
        signature = reader.field(SIGNATURE_BYTES)
        reader.end()
    except FrameError:
        raise RosterInvalid("The roster file is malformed.") from None
    if not verify(root_public, signature, LABEL, body):
        raise RosterInvalid("The roster is not signed by the federation's root.")
    return Roster.decode(body)


@dataclass(frozen=True)
class RosterChange:
    """What a steward is shown before accepting a roster in place of the trusted one."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    rekeyed: tuple[str, ...]
    rolled_back: bool
    """The offered serial number is not above the trusted one, though the content differs."""


def compare(trusted: Roster, offered: Roster) -> RosterChange:
    """Say how an offered roster differs from the trusted one."""
    old = {entry.site: entry for entry in trusted.entries}
    new = {entry.site: entry for entry in offered.entries}
    both = sorted(old.keys() & new.keys())
    return RosterChange(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        rekeyed=tuple(site for site in both if old[site].public_key != new[site].public_key),
        rolled_back=offered.digest != trusted.digest and offered.serial <= trusted.serial,
    )
