"""The ledger's file, which is verified whole once and then followed, entry by entry.

Reading everything costs as much as there are entries. So the state that they add up to is kept,
together with how the file looked, and goes along with each entry that is appended here. Every
transaction first compares the file with what it was: whatever anybody else did to it, all of it is
read and added up again before anything is decided or written.

What is compared: SQLite's count of commits by others (``PRAGMA data_version``), and the marks
(``files.Mark``) of the database, its write-ahead log and its rollback journal. Programs that write
by SQLite wait for its lock; those that do not show in the marks, the time of the last change among
them, which nobody can set back. What such a program writes during one of our own writing
transactions, some milliseconds, our own change hides; it is found when the whole is next read: at
the start of a process, by every command on the budget, and after the next change by anybody else.
Until then the kept state counts, which that write has not changed.

The journal is SQLite's rollback journal with ``synchronous = EXTRA``: when a transaction returns,
its entry is on disk, directory included.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from cloister_fl.client.ledger import chain
from cloister_fl.client.ledger.chain import LABEL, Entry, damaged, rolled_back, unusable
from cloister_fl.encoding.canonical_json import GENESIS, canonical_json, entry_hash
from cloister_fl.system import utc
from cloister_fl.system.files import Mark, mark_of

_WAIT_SECONDS = 60.0

StateT = TypeVar("StateT")


class Head(NamedTuple):
    """The end of a chain: number and hash of its last entry."""

    seq: int
    hash: str


class _Seen(NamedTuple):
    version: int
    marks: tuple[Mark | None, ...]


@dataclass
class _Verified(Generic[StateT]):
    state: StateT
    head: Head
    seen: _Seen
    hashes: list[str]


class LedgerFile(Generic[StateT]):
    """A ledger file over one connection, and the state that its entries add up to.

    Several threads may use it, one transaction at a time. A connection does not survive a fork:
    the child opens and verifies anew, and leaves its parent's alone.

    Args:
        path: the file; see ``create``.
        apply: adds one entry to the state, which is None before the first, and may change it in
            place. It raises ``KeyError``, ``TypeError`` or ``ValueError`` where the entry breaks
            a rule.
        pinned: whether a file is refused that lacks the last entry that was verified or written
            here; without, it is a file like any other.
        pin: an entry that the file must have from the start, where it is pinned.
    """

    def __init__(
        self,
        path: Path,
        apply: Callable[[StateT | None, Entry], StateT],
        *,
        pinned: bool = False,
        pin: Head | None = None,
    ) -> None:
        self._path = path
        self._files = (path, *(path.with_name(f"{path.name}-{end}") for end in ("wal", "journal")))
        self._apply = apply
        self._pinned = pinned
        self._pin = pin
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._end: Callable[[], object] = lambda: None
        self._owner = os.getpid()
        self._verified: _Verified[StateT] | None = None

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[StateT]:
        """Give the state; commit at the end what ``append`` wrote, and roll back on any error.

        A writer holds the only write lock from its first statement on, so the state stays true
        until it has written.

        Raises:
            LedgerDamaged: SQLite cannot read or write the file, or it is no sound chain.
            LedgerRolledBack: see ``pinned``.
        """
        with self._lock:
            verified = self._begun(write)
            head = verified.head
            try:
                yield verified.state
                with as_damage():
                    self._sql("COMMIT")
            except BaseException:
                self._roll_back(unsure=verified.head != head)
                raise
            if verified.head != head:
                # The version is not asked for again: a commit of the instant between would hide.
                verified.seen = verified.seen._replace(marks=self._marks())
                self._pin = verified.head

    def append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        """Write one entry at the end, inside a write transaction, and add it to the state.

        Raises:
            LedgerDamaged: it cannot be written, the end is not the verified one, or the entry
                breaks a rule.
        """
        verified = self._verified
        assert verified is not None
        assert self._connection is not None
        with as_damage():
            entry = append(self._connection, kind, body)
        before, verified.head = verified.head, Head(entry.seq, entry.hash)
        if before != (entry.seq - 1, entry.previous):
            raise damaged("its last entry is not the one that was read")
        verified.hashes.append(entry.hash)
        verified.state = self._added(verified.state, entry)
        return entry

    @property
    def pin(self) -> Head | None:
        """The last entry that was verified or written here, on disk; None before the first."""
        return self._pin

    @property
    def last(self) -> Head:
        """The last entry, inside a transaction."""
        assert self._verified is not None
        return self._verified.head

    def head(self) -> Head:
        """The last entry; raises as ``transaction``."""
        with self.transaction(write=False):
            return self.last

    def hashes(self) -> tuple[str, ...]:
        """Hashes of all entries, oldest first; raises as ``transaction``."""
        with self.transaction(write=False):
            assert self._verified is not None
            return tuple(self._verified.hashes)

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first, read and verified whole; raises as ``transaction``."""
        with self._lock:
            entries = self._verify("BEGIN")
            self._sql("COMMIT")
            return entries

    def is_as_verified(self) -> bool:
        """Whether nobody else touched the file since it was verified.

        Raises:
            LedgerDamaged: SQLite cannot read the file.
        """
        with self._lock, as_damage():
            return self._is_mine() and self._has_marks() and self._is_as_seen()

    def close(self) -> None:
        """Close the connection, which rolls back; the next transaction verifies anew."""
        with self._lock:
            self._verified = self._connection = None
            self._end()

    def _begun(self, write: bool) -> _Verified[StateT]:
        begin = "BEGIN IMMEDIATE" if write else "BEGIN"
        # The marks before a lock is asked for, too: the connection to a file that was replaced
        # must not meet the journal of the file in its place.
        if self._is_mine() and self._verified is not None and self._has_marks():
            with as_damage():
                self._sql(begin)
                if self._is_as_seen():
                    return self._verified
        self._verify(begin)
        assert self._verified is not None
        return self._verified

    def _roll_back(self, *, unsure: bool) -> None:
        """Undo the transaction; where it is unsure what stands on disk now, all is read anew."""
        if not unsure and self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._sql("ROLLBACK")
                return
        self.close()

    def _verify(self, begin: str) -> tuple[Entry, ...]:
        """Begin a transaction on a new connection, which remembers no page, and read everything."""
        self.close()
        try:
            with as_damage():
                self._connection = connection = connect(self._path)
                self._owner = os.getpid()
                self._end = _finalizer(self, connection)
                self._sql(begin)
                # Before the reading: what is written behind it is found the next time.
                seen = _Seen(self._version(), self._marks())
                entries = chain.read(connection)
            state: StateT | None = None
            for entry in entries:
                state = self._added(state, entry)
            assert state is not None
            head = Head(entries[-1].seq, entries[-1].hash)
            self._require_pin(entries)
        except BaseException:
            self.close()
            raise
        self._pin = head
        self._verified = _Verified(state, head, seen, [entry.hash for entry in entries])
        return entries

    def _require_pin(self, entries: tuple[Entry, ...]) -> None:
        pin = self._pin
        if not self._pinned or pin is None:
            return
        if pin.seq > len(entries) or entries[pin.seq - 1].hash != pin.hash:
            raise rolled_back(
                self._path.parent,
                f"The privacy ledger lacks entry {pin.seq} as this process knows it.",
                "An older ledger, or another one, took its place.",
            )

    def _added(self, state: StateT | None, entry: Entry) -> StateT:
        try:
            return self._apply(state, entry)
        except (KeyError, TypeError, ValueError):
            raise damaged(f"entry {entry.seq} breaks a rule of the ledger") from None

    def _is_mine(self) -> bool:
        """Whether the connection is this process's, and no transaction was left open on it."""
        connection = self._connection
        return (
            connection is not None and self._owner == os.getpid() and not connection.in_transaction
        )

    def _is_as_seen(self) -> bool:
        # The version first: within a transaction, it takes the lock that keeps it true.
        verified = self._verified
        if verified is None or verified.seen.version != self._version():
            return False
        return self._has_marks()

    def _has_marks(self) -> bool:
        return self._verified is not None and self._verified.seen.marks == self._marks()

    def _marks(self) -> tuple[Mark | None, ...]:
        return tuple(map(mark_of, self._files))

    def _version(self) -> int:
        assert self._connection is not None
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def _sql(self, statement: str) -> None:
        assert self._connection is not None
        self._connection.execute(statement)


_left_to_their_owners: list[sqlite3.Connection] = []
"""Connections that a fork took along: to close one here could undo its owner's transaction."""


def _finalizer(owner: object, connection: sqlite3.Connection) -> Callable[[], object]:
    """Close a connection when it is called, or its owner is gone; by the process that opened it."""
    process = os.getpid()

    def end() -> None:
        if process == os.getpid():
            connection.close()
        else:
            _left_to_their_owners.append(connection)

    made = weakref.finalize(owner, end)
    made.atexit = False
    return made


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
            for _, _, statement in chain.SCHEMA:
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

    Nothing that stands in it is verified; see ``LedgerFile``.

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
    now, salt = utc.timestamp(), secrets.token_hex(chain.SALT_BYTES)
    full = {**body, "kind": kind, "salt": salt, "seq": seq, "time": now}
    text = canonical_json(full)
    digest = entry_hash(LABEL, text, beside=previous)
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (seq, text, digest))
    return Entry(seq, kind, full, previous, digest)


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Raise ``LedgerDamaged`` where the system or SQLite cannot read or write."""
    try:
        yield
    except (sqlite3.Error, OSError):
        # The text of either may quote the path.
        raise unusable() from None
