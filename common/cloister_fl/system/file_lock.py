"""Advisory locks on files, between processes of one machine (``flock(2)``).

The kernel lets go of a lock when its file is closed or its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def locked(path: Path, taken: Callable[[], Exception] | None = None) -> Iterator[int]:
    """Hold the exclusive lock of a file; yield the file's descriptor, open to read and write.

    Args:
        path: the file; made empty, with mode 0600, where it is not there.
        taken: makes what is raised at once where another process holds the lock; without it,
            the lock is waited for.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link.
    """
    handle = os.open(path, _FLAGS, 0o600)
    try:
        if taken is None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        elif not try_lock(handle):
            raise taken()
        yield handle
    finally:
        os.close(handle)


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file unless another process holds it; whether it was taken.

    Args:
        handle: the file's descriptor.
        shared: whether others may share it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int) -> None:
    """Let go of the lock of an open file."""
    fcntl.flock(handle, fcntl.LOCK_UN)
