"""Files: atomic writes, secrets that only their owner can read, locks, marks that tell a change.

A file is written beside its final name, flushed to disk and renamed, so a process that is killed
at any moment leaves the old content or the new one, never a mixture. Secrets are created once and
refused when anybody else could have read or planted them. Locks are advisory, between processes of
one machine (``flock(2)``); the kernel lets go of one when its file is closed or its process ends,
however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cloister_fl.errors import FileUnreadable, OutputInTheWay

MAX_SECRET_BYTES = 1 << 16
"""Largest key file; a private key is a hundred times smaller."""

GIT_IGNORE = ".gitignore"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Write a file whole, replacing what bears its name.

    Args:
        path: the final name; its folder must exist.
        data: the content.
        mode: permission bits of the file, whatever the umask.
        durable: whether it is flushed to disk before this returns. Without, a power cut can
            leave an empty or torn file: only for what is checked when read and can be made again.

    Raises:
        OutputInTheWay: it cannot be written (no folder, no permission, no space).
    """
    try:
        if path.exists() and not path.is_file():
            # A device or a pipe: a rename would put a file in its place for everybody.
            raise OutputInTheWay(
                f"{path.name} exists and is not a regular file.", remedy="Choose another path."
            )
        temporary = _temporary(path, data, mode, durable=durable)
        try:
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None


def sweep(folder: Path) -> int:
    """Remove what writers that were killed left below ``folder``; return how many files.

    Only while no other process writes there: an unfinished file looks like an abandoned one.
    """
    left = [path for path in folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def create_secret(path: Path, data: bytes) -> bool:
    """Create a file of mode 0600 whole, unless its name is taken.

    Returns:
        Whether it was created. A file that was there is left untouched.

    Raises:
        OutputInTheWay: it cannot be written.
    """
    try:
        if os.path.lexists(path):
            return False
        temporary = _temporary(path, data, 0o600)
        try:
            # A hard link fails where the name exists; a rename would replace a key in silence.
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    return True


def is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing, but perhaps a ``.gitignore``.

    Raises:
        OSError: it cannot be listed.
    """
    return all(path.name == GIT_IGNORE for path in folder.iterdir())


def read_secret(path: Path) -> bytes:
    """Return the bytes of a secret, if nobody but its owner could have read or planted it.

    Raises:
        FileUnreadable: it is missing, a symbolic link, not a regular file, owned by somebody
            else, open to group or world, or larger than ``MAX_SECRET_BYTES``.
    """
    name = path.name
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise _refused(name, "is a symbolic link", "Put the file itself there.") from None
        raise FileUnreadable(
            f"{name} cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Run 'cloister client init' to create what is missing.",
        ) from None
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise _refused(name, "is not a regular file", "Put the file itself there.")
        if about.st_uid != os.geteuid():
            raise _refused(name, "belongs to another user", "Run as the user who made it.")
        if about.st_mode & 0o077:
            raise _refused(
                name,
                f"can be read or changed by others (mode {stat.S_IMODE(about.st_mode):04o})",
                f"Run: chmod 600 {name}. If others used this machine, treat it as disclosed.",
            )
        if about.st_size > MAX_SECRET_BYTES:
            raise _refused(name, "is far too large", "Put the key itself there.")
        return file.read(MAX_SECRET_BYTES)


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
    handle = os.open(path, _LOCK, 0o600)
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


class Mark(NamedTuple):
    """How a file looks to the system; another mark is another file or another content.

    Whoever writes to a file can set its times back, but not the time of its last change of any
    kind, ``changed``: the system sets it, and only a clock that is set back makes it repeat. Since
    Linux 6.13 two changes on a local disk never share it; before, two within one tick of the clock
    (10 ms at most) can, and the second is then told by the size or not at all.

    Attributes:
        device, inode: which file bears the name.
        size: in bytes.
        modified, changed: in ns; mtime and ctime.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def mark_of(file: Path | int) -> Mark | None:
    """Return the mark of a file by its path or descriptor; None where there is no such file.

    A symbolic link is not followed: its own mark is returned.

    Raises:
        OSError: the file cannot be looked at.
    """
    try:
        about = os.fstat(file) if isinstance(file, int) else os.lstat(file)
    except FileNotFoundError:
        return None
    return Mark(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def moved_away(path: Path) -> str:
    """A command that keeps a damaged file under another name, to be pasted into a shell."""
    kept = path.with_name(f"{path.name}.damaged")
    return f"mv --backup=numbered {shlex.quote(str(path))} {shlex.quote(str(kept))}"


def make_private_dir(path: Path) -> None:
    """Create a folder of mode 0700 with its parents, or close one that stands open.

    Raises:
        OutputInTheWay: something else bears its name, or it cannot be created or closed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode):
                raise OutputInTheWay(
                    f"{path.name} exists and is not a folder.",
                    remedy="Move it away, or choose another path.",
                ) from None
            if about.st_mode & 0o077:
                path.chmod(0o700)
    except OSError as error:
        raise unwritable(path, error) from None


def _temporary(path: Path, data: bytes, mode: int, *, durable: bool = True) -> Path:
    """Write ``data`` to a new file beside ``path``, flushed to disk where it must be durable."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, _CREATE, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> OutputInTheWay:
    """The error of a file that the system does not let this process write."""
    return OutputInTheWay(
        f"{path.name} cannot be written.",
        why=(error.strerror or "The system gave no reason") + ".",
        remedy="Choose a folder that exists, that you may write to and that has space.",
    )


def _refused(name: str, what: str, remedy: str) -> FileUnreadable:
    return FileUnreadable(f"{name} {what}, so it is not used as a secret.", remedy=remedy)
