"""Format of the ledger: an append-only, hash-chained table in SQLite, and its whole reading.

Each entry's hash is SHA-256 over a label, the previous entry's hash and the entry's canonical JSON,
so no entry can be changed, removed, added or moved without a break that ``read`` names. Each entry
has a salt of its own, random: a certificate shows the hash of one, and what they say can be
guessed. Cutting off the end leaves a sound, shorter chain; a site sees that by comparing the head
with the one that it noted elsewhere. Triggers refuse changes by accident; whoever can write the
file can drop them, and ``read`` says so. Nothing here is about budgets.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_fl.client.site.folder import command_at
from cloister_fl.encoding.canonical_json import GENESIS, HASH, entry_hash, parse_canonical
from cloister_fl.errors import LedgerDamaged, LedgerRolledBack, PrivacyError

LABEL = b"cloister/ledger/v2\0"
SALT_BYTES = 32
PROTOCOL_KINDS = frozenset({"epoch", "round", "answered"})
"""Entries of secure aggregation: they spend nothing, and share the chain."""

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'append only'); END"
_NEXT = "(SELECT coalesce(max(seq), 0) + 1 FROM entries)"
SCHEMA = (
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
            ``accepted``, ``linked``, ``continued``, or of ``PROTOCOL_KINDS``.
        body: what was written; numbers and words about studies, never about patients.
        previous: hash of the entry before.
        hash: hash of this entry.
    """

    seq: int
    kind: str
    body: Mapping[str, Any]
    previous: str
    hash: str


def read(connection: sqlite3.Connection) -> tuple[Entry, ...]:
    """Read all entries and check the chain.

    Raises:
        LedgerDamaged: naming the first entry that does not fit, or the missing protection.
    """
    found = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    if sorted(found) != sorted(SCHEMA):
        raise damaged("its tables or triggers were changed")
    entries: list[Entry] = []
    previous = GENESIS
    rows = connection.execute("SELECT seq, body, hash FROM entries ORDER BY seq")
    for expected, (seq, text, digest) in enumerate(rows, start=1):
        if seq != expected:
            raise damaged(f"entry {expected} is missing")
        body = parse_canonical(text) if isinstance(text, str) else None
        if seq == 1 and body is not None and "salt" not in body:
            raise unsalted()
        if not isinstance(text, str) or entry_hash(LABEL, text, beside=previous) != digest:
            raise damaged(f"entry {seq} does not have the hash of its content and its predecessor")
        if body is None or body.get("seq") != seq or not isinstance(body.get("kind"), str):
            raise damaged(f"entry {seq} is not in canonical form")
        if not HASH.fullmatch(str(body.get("salt"))):
            raise damaged(f"entry {seq} has no salt")
        entries.append(Entry(seq, body["kind"], body, previous, digest))
        previous = digest
    if not entries:
        raise damaged("entry 1 is missing")
    return tuple(entries)


def damaged(why: str) -> PrivacyError:
    return LedgerDamaged(
        "The privacy ledger cannot be trusted.",
        why=f"{why[0].upper()}{why[1:]}.",
        remedy="Stop, keep the file, and restore the ledger from the site's backup: "
        "cloister explain CLO-302",
    )


def unsalted() -> PrivacyError:
    return LedgerDamaged(
        "The privacy ledger cannot be continued.",
        why="Its entries have no salt: an earlier version of Cloister wrote it.",
        remedy="Keep the file: what it charged stays spent. Then: cloister explain CLO-302",
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


def unusable() -> PrivacyError:
    return LedgerDamaged(
        "The privacy ledger cannot be read or written, so nothing is trained.",
        remedy="Check the file's permissions, the free space on its disk, and that it is a ledger: "
        "cloister explain CLO-302",
    )
