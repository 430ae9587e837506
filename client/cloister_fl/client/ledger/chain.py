"""Ledger file: an append-only, hash-chained table in SQLite, and nothing about budgets.

Each entry's hash is SHA-256 over a label, the previous entry's hash and the entry's canonical JSON,
so no entry can be changed, removed, added or moved without a break that ``read`` names. Cutting off
the end leaves a sound, shorter chain; a site sees that by comparing the head with the one that it
noted elsewhere. Triggers refuse changes by accident; whoever can write the file can drop them, and
``read`` says so.

The journal is SQLite's rollback journal with ``synchronous = EXTRA``: when a transaction returns,
its entry is on disk, directory included.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_fl.client.site.folder import command_at
from cloister_fl.encoding.canonical_json import canonical_json, parse_canonical
from cloister_fl.encoding.hash_chain import GENESIS, entry_hash
from cloister_fl.errors import LedgerDamaged, LedgerRolledBack, PrivacyError
from cloister_fl.system import utc

LABEL = b"cloister/ledger/v1\0"
PROTOCOL_KINDS = frozenset({"epoch", "round", "answered"})
"""Entries of secure aggregation: they spend nothing, and share the chain."""

_WAIT_SECONDS = 60.0

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'append only'); END"
_NEXT = "(SELECT coalesce(max(seq), 0) + 1 FROM entries)"
_SCHEMA = (
    (
        "table",
        "entries",
        "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    ),
    ("trigger", "no_update", f"CREATE TRIGGER no_update BEFORE UPDATE ON entries {_REFUSE}"),
    ("trigger", "no_delete", f"CREATE TRIGGER no_delete BEFORE DELETE ON entries {_REFUSE}"),
    (
        # INSERT OR REPLACE would delete without firing a trigger.
        "trigger",
        "in_order",
        f"CREATE TRIGGER in_order BEFORE INSERT ON entries WHEN NEW.seq IS NOT {_NEXT} {_REFUSE}",
    ),
)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        seq: 1, 2, ... without gaps.
        kind: ``created``, ``reserved``, ``adopted``, ``started``, ``evaluated``, ``closed``,
            ``accepted``, or of ``PROTOCOL_KINDS``.
        body: what was written; numbers and words about studies, never about patients.
        previous: hash of the entry before.
        hash: hash of this entry.
    """

    seq: int
    kind: str
    body: Mapping[str, Any]
    previous: str
    hash: str


def create(path: Path, kind: str, body: Mapping[str, Any]) -> None:
    """Make a file that only its owner may read, with a first entry, unless there is one already.

    Raises:
        LedgerDamaged: the file cannot be made or read.
    """
    try:
        with contextlib.suppress(FileExistsError):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(path, flags, 0o600))
        if path.lstat().st_size:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        raise unusable() from None
    with transaction(path) as connection:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            for _, _, statement in _SCHEMA:
                connection.execute(statement)
            append(connection, kind, body)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, which only its owner may read from then on.

    Threads may share the connection if they take turns.

    Raises:
        sqlite3.Error, OSError: it cannot be opened, or is no regular file.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError("not a regular file")
    if about.st_mode & 0o077:
        path.chmod(0o600)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_WAIT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


@contextlib.contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file for one write transaction; commit at the end, roll back on any error.

    Nothing that stands in it is verified; see ``verified_chain``.

    Raises:
        LedgerDamaged: SQLite cannot read or write the file.
    """
    with as_damage(), contextlib.closing(connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")


def append(connection: sqlite3.Connection, kind: str, body: Mapping[str, Any]) -> Entry:
    """Write one entry at the end of the chain, inside a write transaction."""
    last = connection.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
    # The time is for the reader; nothing is decided by it, for clocks are moved.
    now = utc.timestamp()
    full = {**body, "kind": kind, "seq": seq, "time": now}
    text = canonical_json(full)
    digest = entry_hash(LABEL, text, beside=previous)
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq, text, digest))
    return Entry(seq, kind, full, previous, digest)


def read(connection: sqlite3.Connection) -> tuple[Entry, ...]:
    """Read all entries and check the chain.

    Raises:
        LedgerDamaged: naming the first entry that does not fit, or the missing protection.
    """
    found = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    if sorted(found) != sorted(_SCHEMA):
        raise damaged("its tables or triggers were changed")
    entries: list[Entry] = []
    previous = GENESIS
    rows = connection.execute("SELECT seq, body, hash FROM entries ORDER BY seq")
    for expected, (seq, text, digest) in enumerate(rows, start=1):
        if seq != expected:
            raise damaged(f"entry {expected} is missing")
        if not isinstance(text, str) or entry_hash(LABEL, text, beside=previous) != digest:
            raise damaged(f"entry {seq} does not have the hash of its content and its predecessor")
        body = parse_canonical(text)
        if body is None or body.get("seq") != seq or not isinstance(body.get("kind"), str):
            raise damaged(f"entry {seq} is not in canonical form")
        entries.append(Entry(seq, body["kind"], body, previous, digest))
        previous = digest
    if not entries:
        raise damaged("entry 1 is missing")
    return tuple(entries)


def damaged(why: str) -> PrivacyError:
    return LedgerDamaged(
        "The privacy ledger cannot be trusted.",
        why=f"{why[0].upper()}{why[1:]}.",
        remedy="Stop, keep the file, and restore the ledger from the site's backup.",
    )


def rolled_back(root: Path, what: str, why: str) -> PrivacyError:
    """For the ledger of the site folder ``root`` that is not the newest one."""
    return LedgerRolledBack(
        what,
        why=why,
        remedy="Restore the newest ledger.sqlite. If it is lost, deny each approved study: "
        + command_at(root, "deny HASH --why '...'")
        + ". Then accept the ledger: "
        + command_at(root, "budget accept-ledger"),
    )


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Raise ``LedgerDamaged`` where the system or SQLite cannot read or write."""
    try:
        yield
    except (sqlite3.Error, OSError):
        # The text of either may quote the path.
        raise unusable() from None


def unusable() -> PrivacyError:
    return LedgerDamaged(
        "The privacy ledger cannot be read or written, so nothing is trained.",
        remedy="Check the file's permissions, the free space on its disk, and that it is a ledger.",
    )
