"""The coordinator's database: invites, and the sites that used them.

SQLite, one file, shared by the server and the commands. Every change is one transaction, so a
process killed at any time leaves the old state or the new one. An invite's secret is kept as a
hash; a site's three public keys and its certificate are kept whole. See ``renewal_records`` for the
keys that are to come, and for those that were.

It is made by ``create`` alone, whole. One that is missing, empty or damaged is refused: a new one
in its place would know no site, and every hospital would be turned away.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import (
    DeploymentError,
    EnrolmentRefused,
    ServerFolderInvalid,
    SiteStateInvalid,
)
from cloister_fl.membership.enrolment import INVITE_ID_BYTES, SECRET_BYTES, Request, secret_hash
from cloister_fl.server.coordinator.renewal_records import SCHEMA as RENEWALS_SCHEMA
from cloister_fl.server.coordinator.renewal_records import RenewalRecords
from cloister_fl.system.files import create_secret

PICKUP_S = 7 * 86400
"""How long at least an approved site may fetch its certificate, in seconds."""
SEEN_EVERY_S = 30
_WAIT_MS = 10_000

_INVITES = "SELECT id, site, secret_hash, created, expires, used FROM invites"
_BUSY = {"SQLITE_BUSY", "SQLITE_LOCKED"}
_SYSTEM = {
    "SQLITE_FULL": "Its disk is full.",
    "SQLITE_READONLY": "It may not be written: the file system or the file is read-only.",
    "SQLITE_CANTOPEN": "It cannot be opened.",
    "SQLITE_IOERR": "The system failed to read or write it.",
    "SQLITE_PERM": "This user may not use it.",
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invites (
    id BLOB PRIMARY KEY, site TEXT NOT NULL, secret_hash BLOB NOT NULL,
    created INTEGER NOT NULL, expires INTEGER NOT NULL, used INTEGER);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('pending','approved','revoked')),
    invite BLOB NOT NULL REFERENCES invites (id), identity BLOB NOT NULL UNIQUE,
    node_key BLOB NOT NULL UNIQUE, tls_key BLOB NOT NULL UNIQUE,
    asked INTEGER NOT NULL, decided INTEGER, certificate BLOB, fingerprint BLOB UNIQUE,
    valid_until INTEGER, collected INTEGER, seen INTEGER);
"""
_SITES = (
    "SELECT name, state, identity, node_key, tls_key, asked, decided, certificate, fingerprint,"
    " valid_until, collected, seen FROM sites"
)


@dataclass(frozen=True)
class SiteRow:
    """A site that asked to join. Times are Unix seconds.

    Attributes:
        name: the site id.
        state: ``pending``, ``approved`` or ``revoked``.
        identity: Ed25519 public key, 32 bytes.
        node_key: P-384 public key, PEM.
        tls_key: P-256 public key, PEM.
        asked: when it asked.
        decided: when it was approved or revoked.
        certificate: its client certificate, DER.
        fingerprint: SHA-256 of that, 32 bytes.
        valid_until: when the certificate ends.
        collected: when the site first used it.
        seen: when it last made a request, to about half a minute.
    """

    name: str
    state: str
    identity: bytes
    node_key: bytes
    tls_key: bytes
    asked: int
    decided: int | None
    certificate: bytes | None
    fingerprint: bytes | None
    valid_until: int | None
    collected: int | None
    seen: int | None


@dataclass(frozen=True)
class NewInvite:
    """An invite as it was made.

    Attributes:
        site: the site id.
        invite_id: its id.
        secret: its secret, which is kept nowhere.
        expires: when it ends, in Unix seconds.
        replaced: whether an open, unused invite of the site ended by it.
    """

    site: str
    invite_id: bytes
    secret: bytes = field(repr=False)
    expires: int
    replaced: bool


class _Database(sqlite3.Connection):
    """A connection whose errors are numbered, and name the file and what to do."""

    path = Path()

    def execute(self, statement: str, values: Any = (), /) -> sqlite3.Cursor:
        """As of ``sqlite3``; raises ServerFolderInvalid."""
        try:
            return super().execute(statement, values)
        except sqlite3.Error as error:
            raise unusable(self.path, error) from None


def create(path: Path) -> None:
    """Make an empty database, whole, unless its name is taken.

    Raises:
        OutputInTheWay: it cannot be written.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.executescript(_SCHEMA + RENEWALS_SCHEMA)
        create_secret(path, made.serialize())


class Registry:
    """The opened database; also a context manager that closes it.

    Args:
        path: the file, see ``create``.

    Raises:
        ServerFolderInvalid: it is missing, empty or damaged, or cannot be read or written; its
            methods raise it, too.

    Attributes:
        renewals: keys and certificates that are to come, and those that were.
    """

    def __init__(self, path: Path) -> None:
        self._folder_option = dir_option(path.parent.parent)
        try:
            about = path.stat()
            if not about.st_size:
                raise unusable(path, None)
            if about.st_mode & 0o077:
                path.chmod(0o600)
            # isolation_level None: transactions are begun here, by hand, and nowhere else.
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=_WAIT_MS / 1000,
                isolation_level=None,
                factory=_Database,
            )
            self._db.path = path
        except (OSError, sqlite3.Error) as error:
            raise unusable(path, error) from None
        try:
            if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise unusable(path, None)
            for rows in (_SITES, _INVITES):
                self._db.execute(f"{rows} LIMIT 0")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            # The log is as long as the most that was written between two checkpoints. At SQLite's
            # 1000 pages a small database had a log of 4 MiB, most of what a long run wrote.
            self._db.execute("PRAGMA wal_autocheckpoint = 64")
            self._db.execute("PRAGMA foreign_keys = ON")
            # A database of an earlier version has no renewals.
            for statement in RENEWALS_SCHEMA.split(";"):
                self._db.execute(statement)
        except BaseException:
            self._db.close()
            raise
        self.renewals = RenewalRecords(self._db, self._change)

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @contextmanager
    def waiting(self, most_ms: int) -> Iterator[None]:
        """Wait no longer than ``most_ms`` milliseconds for another program's write meanwhile."""
        (before,) = self._db.execute("PRAGMA busy_timeout").fetchone()
        self._db.execute(f"PRAGMA busy_timeout = {min(most_ms, before)}")
        try:
            yield
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {before}")

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # Invites

    def invite(self, sites: Iterable[str], lifetime_s: int) -> tuple[NewInvite, ...]:
        """Make an invite for each site, none of which is one now; earlier ones for them end.

        A name that was revoked can be invited again: whoever uses the invite has new keys.

        Raises:
            SiteStateInvalid: a site has asked or is approved; none is invited.
        """
        now = int(time.time())
        with self._change():
            return tuple([self._invite(site, now, now + lifetime_s) for site in sites])

    def _invite(self, site: str, now: int, expires: int) -> NewInvite:
        held = self.site(site)
        if held is not None and held.state != "revoked":
            raise SiteStateInvalid(
                f"{site} is {held.state} already, so it gets no invite.",
                remedy="If its keys are lost, revoke it, then invite it again: "
                f"cloister server revoke {site}{self._folder_option}",
            )
        invite_id, secret = secrets.token_bytes(INVITE_ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        ended = self._db.execute(
            "UPDATE invites SET expires = ? WHERE site = ? AND expires > ?", (now, site, now)
        ).rowcount
        self._db.execute(
            "INSERT INTO invites VALUES (?, ?, ?, ?, ?, NULL)",
            (invite_id, site, secret_hash(secret), now, expires),
        )
        return NewInvite(site, invite_id, secret, expires, replaced=ended > 0)

    def open_invites(self) -> int:
        """How many invites keep the enrolment port open: unused, or their site has not come in."""
        row = self._db.execute(
            "SELECT COUNT(*) FROM invites LEFT JOIN sites ON sites.invite = invites.id"
            " WHERE expires > ? AND (used IS NULL OR"
            " (sites.state != 'revoked' AND sites.collected IS NULL))",
            (int(time.time()),),
        ).fetchone()
        return int(row[0])

    def use(self, request: Request) -> SiteRow:
        """Let a request, whose proofs were checked, use its invite; the site is pending then.

        A repeated request with the same keys gets the same answer, also after a lost reply. Where
        the name was revoked, its keys and certificate are retired, and the new ones take their
        place.

        Raises:
            EnrolmentRefused: no such invite or another secret (``why`` is ``invite-unknown``),
                ``invite-used``, ``invite-expired``, ``key-in-use``.
        """
        now = int(time.time())
        with self._change():
            row = self._db.execute(
                "SELECT site, secret_hash, expires, used FROM invites WHERE id = ?",
                (request.invite_id,),
            ).fetchone()
            matches = hmac.compare_digest(row[1] if row else bytes(32), secret_hash(request.secret))
            if row is None or not matches or row[0] != request.site:
                raise refusal("invite-unknown")
            keys = (request.identity, request.node_key, request.tls_key)
            if row[3] is not None:
                held = self.site(request.site)
                if held and (held.identity, held.node_key, held.tls_key) == keys:
                    return held
                raise refusal("invite-used")
            if row[2] <= now:
                raise refusal("invite-expired")
            if any(map(self.renewals.is_known, keys)):
                raise refusal("key-in-use")
            before = self.site(request.site)
            if before is not None and before.state != "revoked":
                raise refusal("invite-used")
            self._db.execute("UPDATE invites SET used = ? WHERE id = ?", (now, request.invite_id))
            if before is not None:
                self.renewals.retire(request.site, renewed=False)
                self._db.execute("DELETE FROM sites WHERE name = ?", (request.site,))
            self._db.execute(
                "INSERT INTO sites (name, state, invite, identity, node_key, tls_key, asked)"
                " VALUES (?, 'pending', ?, ?, ?, ?, ?)",
                (request.site, request.invite_id, *keys, now),
            )
        return self._known(request.site)

    def asker(self, invite_id: bytes, identity: bytes) -> SiteRow:
        """The site that used an invite with this identity.

        Raises:
            EnrolmentRefused: there is none (``why`` is ``invite-unknown``).
        """
        row = self._db.execute(
            _SITES + " WHERE invite = ? AND identity = ?",
            (invite_id, identity),
        ).fetchone()
        if row is None:
            raise refusal("invite-unknown")
        return SiteRow(*row)

    # Sites

    def sites(self) -> tuple[SiteRow, ...]:
        """All sites by name."""
        rows = self._db.execute(_SITES + " ORDER BY name")
        return tuple(SiteRow(*row) for row in rows)

    def invited(self) -> tuple[tuple[str, int], ...]:
        """Sites with an open, unused invite, and when it ends."""
        rows = self._db.execute(
            "SELECT site, expires FROM invites WHERE used IS NULL AND expires > ? ORDER BY site",
            (int(time.time()),),
        )
        return tuple((str(site), int(expires)) for site, expires in rows)

    def site(self, name: str) -> SiteRow | None:
        """One site, or ``None``."""
        row = self._db.execute(
            _SITES + " WHERE name = ?",
            (name,),
        ).fetchone()
        return SiteRow(*row) if row else None

    def by_certificate(self, fingerprint: bytes) -> SiteRow | None:
        """The site with this certificate (SHA-256, 32 bytes), whatever its state."""
        row = self._db.execute(
            _SITES + " WHERE fingerprint = ?",
            (fingerprint,),
        ).fetchone()
        return SiteRow(*row) if row else None

    def by_renewed(self, fingerprint: bytes) -> SiteRow | None:
        """The site that shows its renewed certificate for the first time; it holds from now on.

        Raises:
            ServerFolderInvalid: another process writes; nothing has changed.
        """
        name = self.renewals.take(fingerprint)
        return None if name is None else self.site(name)

    def approve(self, name: str, certificate: bytes, fingerprint: bytes, valid_until: int) -> None:
        """Make a pending site an approved one, with its certificate, in one transaction.

        Raises:
            SiteStateInvalid: it is not pending.
        """
        now = int(time.time())
        with self._change():
            self._require(name, "pending")
            self._db.execute(
                "UPDATE sites SET state = 'approved', decided = ?, certificate = ?,"
                " fingerprint = ?, valid_until = ? WHERE name = ?",
                (now, certificate, fingerprint, valid_until, name),
            )
            self._db.execute(
                "UPDATE invites SET expires = MAX(expires, ?)"
                " WHERE id = (SELECT invite FROM sites WHERE name = ?)",
                (now + PICKUP_S, name),
            )

    def revoke(self, name: str) -> None:
        """Revoke a site's keys permanently, and end its invites; a site that never asked too.

        Raises:
            SiteStateInvalid: nobody of that name was invited or is a site.
        """
        now = int(time.time())
        with self._change():
            ended = self._db.execute(
                "UPDATE invites SET expires = ? WHERE site = ? AND used IS NULL AND expires > ?",
                (now, name, now),
            ).rowcount
            self.renewals.drop(name)
            changed = self._db.execute(
                "UPDATE sites SET state = 'revoked', decided = ? WHERE name = ?", (now, name)
            ).rowcount
            if not ended and not changed:
                raise self._wrong_state(name, None)

    def saw(self, site: SiteRow) -> None:
        """Note a request of a site, at most once in ``SEEN_EVERY_S`` seconds.

        Its certificate works, so its invite keeps no port open any more. Where another process
        holds the database, or the disk is full, it is not noted, and the request goes on.
        """
        now = int(time.time())
        # Also where it was seen later than now: the clock was ahead.
        if site.seen is None or abs(now - site.seen) >= SEEN_EVERY_S:
            # All ports wait meanwhile, so it waits for nobody else's write.
            with self.waiting(50), contextlib.suppress(DeploymentError):
                self._db.execute(
                    "UPDATE sites SET seen = ?, collected = COALESCE(collected, ?) WHERE name = ?",
                    (now, now, site.name),
                )

    def _known(self, name: str) -> SiteRow:
        site = self.site(name)
        if site is None:
            raise self._wrong_state(name, None)
        return site

    def _require(self, name: str, state: str) -> None:
        held = self.site(name)
        if held is None or held.state != state:
            raise self._wrong_state(name, held)

    def _wrong_state(self, name: str, held: SiteRow | None) -> DeploymentError:
        state = f"is {held.state} already" if held else "has not asked to join"
        return SiteStateInvalid(
            f"{name} {state}.", remedy=f"List the sites: cloister server sites{self._folder_option}"
        )


def refusal(code: str) -> EnrolmentRefused:
    """A refusal of an enrolment; ``why`` is a code from a closed list."""
    return EnrolmentRefused("The request was refused.", why=code)


def unusable(path: Path, error: Exception | None, way_on: str = "") -> DeploymentError:
    """The error of a database of the coordinator that cannot be used.

    Args:
        path: the file, in the folder ``state``.
        error: what SQLite or the system said; None where its content is not as it must be.
        way_on: what to do about one that is damaged; unless given, as for the sites' database.
    """
    file = shlex.quote(str(path))
    name = f"{path.parent.name}/{path.name}"
    code = "_".join(str(getattr(error, "sqlite_errorname", "")).split("_")[:2])
    if code in _BUSY:
        return ServerFolderInvalid(
            f"{name} is locked by another program.",
            why=f"It was waited for, {_WAIT_MS // 1000} s.",
            remedy=f"Find the program, end it, and repeat the command: fuser -v {file}",
        )
    if code in _SYSTEM or (isinstance(error, OSError) and path.exists()):
        return ServerFolderInvalid(
            f"{name} cannot be read or written.",
            why=_SYSTEM.get(code, "The system does not allow it."),
            remedy="Free space, make the file system writable or correct the permissions, and "
            f"repeat the command: df -h {file}; findmnt -T {file}; ls -l {file}",
        )
    folder = path.parent.parent
    return ServerFolderInvalid(
        f"{name} is {'damaged' if path.exists() else 'missing'}.",
        why="Its content is not that of this version's database." if path.exists() else "",
        remedy="Nothing was changed. "
        + (
            way_on
            or "Restore it from the newest backup of the folder, with the server stopped. "
            "Without one, each hospital joins again: cloister explain CLO-801. "
        )
        + f"Keep the damaged file: {moved_away(path)}"
        + (f"; cloister server start{dir_option(folder)}" if way_on else ""),
    )


def moved_away(path: Path) -> str:
    """A command that moves a database, and what SQLite keeps beside it, into a folder."""
    kept = shlex.quote(str(path.parent / "damaged"))
    return f"mkdir -p {kept} && mv --backup=numbered {shlex.quote(str(path))}* {kept}"
