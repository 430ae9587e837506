"""Lock file of a service with its process id: one process per folder."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloister_fl.system.files import try_lock, unlock, unwritable

_AGAIN_S = 0.002


@contextlib.contextmanager
def only_one(lock: Path, taken: Callable[[], Exception]) -> Iterator[None]:
    """Hold a lock file, with this process's id in it.

    The kernel lets go of it when the process ends, however it ends.

    Args:
        lock: the file; made with mode 0600.
        taken: makes what is raised where another process holds it.

    Raises:
        OutputInTheWay: the file cannot be made or written.
    """
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(lock, error) from None
    try:
        while not try_lock(handle):
            # Who only asks whether somebody holds it shares it for a moment.
            if not try_lock(handle, shared=True):
                raise taken()
            unlock(handle)
            time.sleep(_AGAIN_S)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise unwritable(lock, error) from None
        yield
    finally:
        os.close(handle)


def holder(lock: Path) -> int | None:
    """Return the process id of the lock's holder, or ``None``."""
    try:
        # Only to read: the answer is the same where the file system has become read-only.
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if try_lock(handle, shared=True):
            return None
        text = os.pread(handle, 32, 0).decode().strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(handle)


def terminate(lock: Path, seconds: float) -> bool | None:
    """Send SIGTERM to the lock's holder, and wait until the lock is released.

    Returns:
        ``None`` where nobody held it, else whether it was let go in time.
    """
    process = holder(lock)
    if process is None:
        return None
    os.kill(process, signal.SIGTERM)
    end = time.monotonic() + seconds
    while holder(lock) is not None:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
