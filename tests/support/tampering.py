"""Changes of a site's files by another process, which sets the time of modification back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BEGIN = """
import os, shutil, sqlite3, sys
path = sys.argv[1]
before = os.stat(path)
"""
_END = """
os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
"""
_ROWS = """
connection = sqlite3.connect(path)
triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
triggers = triggers.fetchall()
for name, _ in triggers:
    connection.execute(f"DROP TRIGGER {name}")
for statement in sys.argv[2:]:
    connection.execute(statement)
for _, sql in triggers:
    connection.execute(sql)
connection.commit()
connection.close()
"""
_LEFT_IN_WAL = """
# Killed: nobody moves the write-ahead log into the database.
connection = sqlite3.connect(path, isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute("BEGIN IMMEDIATE")
for statement in sys.argv[2:]:
    connection.execute(statement)
connection.execute("COMMIT")
os.kill(os.getpid(), 9)
"""


def elsewhere(code: str, *arguments: str) -> int:
    """Run code in another process; its exit status."""
    command = [sys.executable, "-I", "-S", "-c", code, *arguments]
    return subprocess.run(command, check=False).returncode


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    """Write ``new``, as long as ``old``, over the last place where a file has ``old``."""
    assert len(old) == len(new)
    place = path.read_bytes().rindex(old)
    code = f"""
with open(path, "r+b") as file:
    file.seek({place})
    file.write({new!r})
"""
    assert elsewhere(_BEGIN + code + _END, str(path)) == 0


def cut(path: Path, size: int) -> None:
    """Take so many bytes off the end of a file."""
    code = f"os.truncate(path, before.st_size - {size})"
    assert elsewhere(_BEGIN + code + _END, str(path)) == 0


def put_in_place(path: Path, other: Path) -> None:
    """Put a copy of another file in the place of a file, under another inode."""
    code = """
shutil.copyfile(sys.argv[2], path + ".new")
os.replace(path + ".new", path)
"""
    assert elsewhere(_BEGIN + code + _END, str(path), str(other)) == 0


def rewrite_rows(path: Path, *statements: str) -> None:
    """Run statements on a ledger's table, whose triggers are dropped and put back."""
    assert elsewhere(_BEGIN + _ROWS + _END, str(path), *statements) == 0


def leave_in_wal(path: Path, *statements: str) -> Path:
    """Run statements on a database that stay in its write-ahead log; the log's path."""
    assert elsewhere(_BEGIN + _LEFT_IN_WAL, str(path), *statements) == -9
    log = path.with_name(f"{path.name}-wal")
    assert log.stat().st_size > 0
    return log
