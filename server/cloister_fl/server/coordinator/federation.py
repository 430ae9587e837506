"""The federation's root key, the roster that it signs, and the coordinator's audit log.

::

    root.pem        Ed25519 key of the root, mode 0600
    roster          the signed roster in force
    audit.jsonl     what was decided, what was asked of the sites and what came back
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cloister_fl.audit_log import AuditLog, Value
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import FileUnreadable
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, open_roster, sign_roster
from cloister_fl.system.files import create_secret, make_private_dir, read_secret, write_atomic

_ROOT = "root.pem"
_ROSTER = "roster"
AUDIT = "audit.jsonl"


class Federation:
    """The folder of a federation at the coordinating site; made where it is missing.

    Raises:
        OutputInTheWay: the folder or a file cannot be created.
        FileUnreadable: the root key is readable by others, or cannot be read.
        IdentityInvalid: it is not a key.
    """

    def __init__(self, folder: Path) -> None:
        make_private_dir(folder)
        create_secret(folder / _ROOT, Identity.generate().to_pem())
        self._root = Identity.from_pem(read_secret(folder / _ROOT))
        self._path = folder / _ROSTER

    @property
    def root(self) -> bytes:
        """The root's public key, 32 bytes."""
        return self._root.public

    @property
    def log(self) -> AuditLog:
        """The coordinator's audit log, signed with the root."""
        return AuditLog(self._path.with_name(AUDIT), self._root)

    def note(self, kind: str, **body: Value) -> None:
        """Log a decision of the coordinator's people, and sign the log.

        Raises:
            AuditLogDamaged: it cannot be written.
        """
        self.log.append(kind, **body)
        self.log.sign()

    def enrol(self, name: str, sites: Mapping[str, bytes]) -> Roster:
        """Make the roster hold exactly these sites; its serial rises where that is a change.

        Args:
            name: the federation's.
            sites: public key (32 bytes) by site id.

        Raises:
            RosterInvalid: an id or key that cannot be used.
            AuditLogDamaged: the log cannot be written; the roster stays as it is.
        """
        entries = [RosterEntry(site, key) for site, key in sites.items()]
        held = self.roster() if self._path.exists() else None
        roster = Roster.of(name, held.serial if held else 1, entries)
        if held is not None and roster != held:
            roster = Roster.of(name, held.serial + 1, entries)
        if roster != held:
            digest, count = roster.digest.hex(), len(roster.entries)
            # First: no roster is offered to a site that the log does not know.
            self.note("roster", serial=roster.serial, digest=digest, sites=count)
            write_atomic(self._path, sign_roster(roster, self._root))
        return roster

    def signed(self) -> bytes:
        """The signed roster, as sites are offered it.

        Raises:
            FileUnreadable: there is none.
        """
        try:
            return self._path.read_bytes()
        except OSError:
            raise FileUnreadable(
                "The federation has no roster.",
                why=f"{self._path} cannot be read.",
                remedy="Approve its sites: cloister server approve"
                + dir_option(self._path.parent.parent),
            ) from None

    def roster(self) -> Roster:
        """The roster in force; see ``signed`` and ``open_roster`` for the errors."""
        return open_roster(self.signed(), self.root)
