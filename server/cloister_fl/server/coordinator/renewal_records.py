"""Renewals and retired keys in the coordinator's database.

A renewal passes three states, each one transaction, so a process that is killed leaves one of them:

1. asked: the new keys stand here, proven, and nothing else has changed;
2. issued: the new certificate stands here, too, beside the one in force, which goes on to hold;
3. taken: at the first request that shows the new certificate it takes the place of the old one,
   which is retired with its keys.

So the site may lose the answer, or be killed before or after it switched: whichever of the two it
shows is the one that holds, and it never shows the old one again once it has shown the new one.
Retired are also the keys of a revoked site whose name was invited again: no key comes back.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from cloister_fl.errors import EnrolmentRefused

AGAIN_S = 3600
"""Seconds between two renewals of one site with other keys: each costs a signature of the authority
and entries of the audit log."""
WAITING_S = 600
"""How long after it was last asked for a certificate is still issued, in seconds."""
_BUSY_MS = 50

Kind = Literal["identity", "node", "tls", "certificate"]
"""What is retired: a public key by its purpose, or a certificate's SHA-256."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS renewals (
    name TEXT PRIMARY KEY REFERENCES sites (name), node_key BLOB NOT NULL UNIQUE,
    tls_key BLOB NOT NULL UNIQUE, replaces BLOB NOT NULL, begun INTEGER NOT NULL,
    asked INTEGER NOT NULL, certificate BLOB, fingerprint BLOB UNIQUE, valid_until INTEGER);
CREATE TABLE IF NOT EXISTS retired (
    value BLOB PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, at INTEGER NOT NULL,
    successor BLOB);
"""


@dataclass(frozen=True)
class RenewalRow:
    """A renewal that was asked for, and not taken yet.

    Attributes:
        name: the site id.
        node_key: the new P-384 public key, PEM.
        tls_key: the new P-256 public key, PEM.
        replaces: SHA-256 of the certificate that it was asked with, 32 bytes.
        begun: when these keys were first asked for, Unix seconds.
        asked: when they were last asked for.
        certificate: the new certificate, DER; None until it is issued.
    """

    name: str
    node_key: bytes
    tls_key: bytes
    replaces: bytes
    begun: int
    asked: int
    certificate: bytes | None


class RenewalRecords:
    """The tables, over the registry's connection.

    Args:
        db: the connection.
        change: begins a write transaction, and commits at its end.
    """

    def __init__(
        self, db: sqlite3.Connection, change: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._db = db
        self._change = change

    def of(self, name: str) -> RenewalRow | None:
        """The renewal of a site, or ``None``."""
        row = self._db.execute(
            "SELECT name, node_key, tls_key, replaces, begun, asked, certificate FROM renewals"
            " WHERE name = ?",
            (name,),
        ).fetchone()
        return RenewalRow(*row) if row else None

    def ask(self, name: str, shown: bytes, node_key: bytes, tls_key: bytes) -> bytes | None:
        """Note that a site, whose proofs were checked, wants a certificate for new keys.

        Asking again for the same keys changes nothing, also after a lost answer.

        Args:
            name: the site id.
            shown: SHA-256 of its certificate in force, which it showed.
            node_key, tls_key: the new public keys, PEM.

        Returns:
            The certificate, DER, once it is issued.

        Raises:
            EnrolmentRefused: ``why`` is ``key-in-use``, or ``renewed-lately`` for other keys than
                within the last hour.
        """
        now, wanted = int(time.time()), (node_key, tls_key, shown)
        held = self.of(name)
        if held is not None and (held.node_key, held.tls_key, held.replaces) == wanted:
            if held.certificate is None:
                with self._change():
                    self._db.execute("UPDATE renewals SET asked = ? WHERE name = ?", (now, name))
            return held.certificate
        with self._change():
            if self._is_too_soon(name, shown, now):
                raise EnrolmentRefused("The request was refused.", why="renewed-lately")
            # First: the same keys, asked with another certificate, are this renewal's own.
            self._db.execute("DELETE FROM renewals WHERE name = ?", (name,))
            if any(map(self.is_known, (node_key, tls_key))):
                raise EnrolmentRefused("The request was refused.", why="key-in-use")
            self._db.execute(
                "INSERT INTO renewals (name, node_key, tls_key, replaces, begun, asked)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (name, *wanted, now, now),
            )
        return None

    def _is_too_soon(self, name: str, shown: bytes, now: int) -> bool:
        (begun,) = self._db.execute(
            "SELECT MAX(begun) FROM renewals WHERE name = ? AND replaces = ?", (name, shown)
        ).fetchone()
        (taken,) = self._db.execute(
            "SELECT MAX(at) FROM retired WHERE name = ? AND successor IS NOT NULL", (name,)
        ).fetchone()
        # One that lies ahead was noted by a clock that was ahead, and would hold until then.
        return any(now - AGAIN_S < (at or 0) <= now for at in (begun, taken))

    def is_known(self, key: bytes) -> bool:
        """Whether a public key is, was, or is about to be somebody's."""
        found = self._db.execute(
            "SELECT 1 FROM sites WHERE :key IN (identity, node_key, tls_key)"
            " UNION SELECT 1 FROM renewals WHERE :key IN (node_key, tls_key)"
            " UNION SELECT 1 FROM retired WHERE value = :key",
            {"key": key},
        ).fetchone()
        return found is not None

    def waiting(self) -> tuple[str, ...]:
        """Sites that asked within the last minutes, and whose certificate is not issued yet."""
        rows = self._db.execute(
            "SELECT name FROM renewals WHERE certificate IS NULL AND asked > ? ORDER BY name",
            (int(time.time()) - WAITING_S,),
        )
        return tuple(str(name) for (name,) in rows)

    def issue(
        self, row: RenewalRow, certificate: bytes, fingerprint: bytes, valid_until: int
    ) -> bool:
        """Keep the certificate for a renewal's keys; whether it is still wanted.

        The keys and the certificate in force are compared again: the site may have asked for other
        keys, or been revoked, since ``row`` was read.
        """
        with self._change():
            done = self._db.execute(
                "UPDATE renewals SET certificate = ?, fingerprint = ?, valid_until = ?"
                " WHERE name = ? AND node_key = ? AND tls_key = ? AND certificate IS NULL"
                " AND replaces = (SELECT fingerprint FROM sites WHERE sites.name = renewals.name"
                " AND state = 'approved')",
                (certificate, fingerprint, valid_until, row.name, row.node_key, row.tls_key),
            )
        return done.rowcount == 1

    def take(self, fingerprint: bytes) -> str | None:
        """Put a renewed certificate in force, since a site shows it; the site's name.

        Args:
            fingerprint: SHA-256 of what was shown.

        Returns:
            ``None`` where it is no renewed certificate of an approved site.

        Raises:
            ServerFolderInvalid: another process writes; nothing has changed.
        """
        found = self._db.execute(
            "SELECT renewals.name FROM renewals JOIN sites ON sites.name = renewals.name"
            " WHERE renewals.fingerprint = ? AND state = 'approved'",
            (fingerprint,),
        ).fetchone()
        if found is None:
            return None
        (name,) = found
        (wait_ms,) = self._db.execute("PRAGMA busy_timeout").fetchone()
        # All ports wait meanwhile.
        self._db.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        try:
            with self._change():
                self.retire(name, renewed=True)
                self._db.execute(
                    "UPDATE sites SET (node_key, tls_key, certificate, fingerprint, valid_until) ="
                    " (SELECT node_key, tls_key, certificate, fingerprint, valid_until"
                    " FROM renewals WHERE renewals.name = sites.name) WHERE name = ?",
                    (name,),
                )
                self._db.execute("DELETE FROM renewals WHERE name = ?", (name,))
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {wait_ms}")
        return str(name)

    def retire(self, name: str, *, renewed: bool) -> None:
        """Retire the keys and the certificate of a site, inside a write transaction.

        Args:
            name: the site id.
            renewed: whether its renewal takes their place, so the identity stays.
        """
        row = self._db.execute(
            "SELECT identity, node_key, tls_key, fingerprint FROM sites WHERE name = ?", (name,)
        ).fetchone()
        identity, node, tls, certificate = row
        after = self.of(name)
        values: tuple[tuple[Kind, bytes | None, bytes | None], ...] = (
            ("identity", None if renewed else identity, None),
            ("node", node, after.node_key if renewed and after else None),
            ("tls", tls, None),
            ("certificate", certificate, None),
        )
        now = int(time.time())
        for kind, value, successor in values:
            if value is not None:
                self._db.execute(
                    "INSERT OR IGNORE INTO retired VALUES (?, ?, ?, ?, ?)",
                    (value, kind, name, now, successor),
                )

    def drop(self, name: str) -> None:
        """Forget a renewal that nobody may take any more."""
        self._db.execute("DELETE FROM renewals WHERE name = ?", (name,))

    def retired(self, kind: Kind) -> frozenset[bytes]:
        """All retired values of a kind."""
        rows = self._db.execute("SELECT value FROM retired WHERE kind = ?", (kind,))
        return frozenset(bytes(value) for (value,) in rows)

    def successors(self) -> dict[bytes, bytes]:
        """Node keys that took the place of another by a renewal: the other one, by the new key."""
        rows = self._db.execute(
            "SELECT successor, value FROM retired WHERE kind = 'node' AND successor IS NOT NULL"
        )
        return {bytes(new): bytes(old) for new, old in rows}
