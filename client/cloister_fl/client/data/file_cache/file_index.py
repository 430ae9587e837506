"""File index of a data folder, so that only changed files are opened again.

A file is known by a keyed hash of its path and by its stamp (``file_finder.Found.stamp``); of its
content a keyed hash is kept, and the reason where it was turned away. Nothing here is a secret, a
path or an identifier, and nothing is trusted that this site did not write: each row is sealed with
a keyed hash. A file without a row, or with another stamp, is read.

What is lost here is only time: a disk that is full, or a damaged index, makes files be read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from cloister_fl.errors import Reject

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (name BLOB PRIMARY KEY, stamp TEXT, content BLOB, seal BLOB);
CREATE TABLE IF NOT EXISTS rejects (
    content BLOB, spec TEXT, reason BLOB, seal BLOB, PRIMARY KEY (content, spec)
);
"""
_FORMAT = b"cloister/index/v1\0"
_PASSING = frozenset((Reject.EXHAUSTED, Reject.DECODE_FAILED, Reject.UNREADABLE, Reject.DUPLICATE))
"""Reasons that another day, or another order of the files, may undo."""
_WRITE_EVERY = 200


class Index:
    """An index of one site; use it from one thread, and close it.

    Args:
        path: the SQLite file; made, or made anew, where it cannot be used.
        key: the site's cache key, 32 bytes; a key of its own is derived.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self._key = hmac.new(key, _FORMAT, hashlib.sha256).digest()
        self._rows: sqlite3.Connection | None = None
        self._unwritten = 0
        for _ in range(2):
            with contextlib.suppress(sqlite3.Error, OSError):
                self._rows = _open(path)
                return
            # Damaged, or of another version: it is worth no more than the time to fill it again.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is new, and let go of the file."""
        if self._rows is not None:
            with contextlib.suppress(sqlite3.Error):
                self._rows.commit()
            self._rows.close()
            self._rows = None

    def content(self, name: bytes, stamp: str) -> bytes | None:
        """The content that a file of this name and stamp has, or None."""
        hidden = self._hidden(name)
        for content, seal in self._ask(
            "SELECT content, seal FROM files WHERE name = ? AND stamp = ?", hidden, stamp
        ):
            if _bytes(content, seal) and hmac.compare_digest(
                seal, self._seal(b"file", hidden, stamp.encode(), content)
            ):
                return bytes(content)
        return None

    def saw(self, name: bytes, stamp: str, content: bytes) -> None:
        """Note the content of a file that was read after its ``stamp`` was taken."""
        hidden = self._hidden(name)
        seal = self._seal(b"file", hidden, stamp.encode(), content)
        self._write(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", hidden, stamp, content, seal
        )

    def reason(self, content: bytes, spec: str) -> Reject | None:
        """Why a file of this content is turned away under this ``spec``, or None."""
        for reason, seal in self._ask(
            "SELECT reason, seal FROM rejects WHERE content = ? AND spec = ?", content, spec
        ):
            if not _bytes(reason, seal):
                continue
            right = self._seal(b"reject", content, spec.encode(), reason)
            if hmac.compare_digest(seal, right):
                return Reject(reason.decode())
        return None

    def turned_away(self, content: bytes, spec: str, reason: Reject) -> None:
        """Note why a file was turned away, where the same will happen again."""
        if reason in _PASSING:
            return
        seal = self._seal(b"reject", content, spec.encode(), reason.value.encode())
        self._write(
            "INSERT OR REPLACE INTO rejects VALUES (?, ?, ?, ?)",
            content, spec, reason.value.encode(), seal,
        )  # fmt: skip

    def _ask(self, statement: str, *values: object) -> Iterator[tuple[bytes, bytes]]:
        if self._rows is not None:
            with contextlib.suppress(sqlite3.Error):
                yield from self._rows.execute(statement, values).fetchall()

    def _write(self, statement: str, *values: object) -> None:
        if self._rows is None:
            return
        with contextlib.suppress(sqlite3.Error):
            self._rows.execute(statement, values)
            self._unwritten += 1
            if self._unwritten >= _WRITE_EVERY:
                self._rows.commit()
                self._unwritten = 0

    def _hidden(self, name: bytes) -> bytes:
        return self._seal(b"name", name)

    def _seal(self, *words: bytes) -> bytes:
        message = b"".join(len(word).to_bytes(8, "big") + word for word in words)
        return hmac.new(self._key, message, hashlib.sha256).digest()


def _bytes(*cells: object) -> bool:
    """Whether cells are what was written: SQLite keeps any type in any column."""
    return all(isinstance(cell, bytes) for cell in cells)


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    rows = sqlite3.connect(path, timeout=1.0)
    try:
        rows.executescript(_SCHEMA)
        rows.execute("SELECT name, stamp, content, seal FROM files LIMIT 1").fetchall()
        rows.execute("SELECT content, spec, reason, seal FROM rejects LIMIT 1").fetchall()
    except sqlite3.Error:
        rows.close()
        raise
    return rows
