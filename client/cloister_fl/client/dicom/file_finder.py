"""File finder: the files of a data folder, whatever its structure, in a fixed order.

Nothing is opened here. Symbolic links are not followed: one that points inside the folder leads
to a file that is found anyway, one that points outside is turned away and counted. A DICOMDIR
lists other files and is untrusted (CVE-2026-32711); it holds no image and is passed over.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_FILE_BYTES
from cloister_fl.errors import FolderUnreadable, Reject

_SETTLED_NS = 2_000_000_000
"""How old a change must be: a file system's clock ticks in steps, of two seconds on some."""


@dataclass(frozen=True)
class Found:
    """One thing in the folder that is not a folder.

    Attributes:
        path: where it lies; kept out of ``repr``, for a path can name a patient.
        name: the path within the folder, so that moving the folder whole changes no name.
        reason: why it is turned away unopened, or None.
        root: the folder, without links.
    """

    path: Path
    name: bytes
    reason: Reject | None = None
    root: Path | None = None

    def __repr__(self) -> str:
        return f"Found(reason={self.reason})"

    def read(self) -> bytes:
        """Return the file's bytes; see ``read_file``."""
        return read_file(self.path, self.root)

    def stamp(self) -> str:
        """What changes whenever the file does, but by those who can set a machine's clock.

        Empty where the file is gone, or is too young for its stamp to tell two writes apart.
        """
        try:
            about = self.path.lstat()
        except OSError:
            return ""
        if time.time_ns() - about.st_ctime_ns < _SETTLED_NS:
            return ""
        parts = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        return "/".join(map(str, parts))


def is_listable(root: Path) -> bool:
    """Whether a data folder is there and may be listed."""
    try:
        _entries(root)
    except OSError:
        return False
    return True


def discover(root: Path) -> tuple[Found, ...]:
    """List a data folder, ordered by the bytes of the relative path.

    Raises:
        FolderUnreadable: ``root`` is missing, not a folder, or may not be listed. A folder below
            it that may not be listed is one ``Reject.UNREADABLE``.
    """
    try:
        real = root.resolve(strict=True)
        entries = _entries(real)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise FolderUnreadable(
            "The site's data folder cannot be read.",
            why=(reason or "The system gave no reason") + ".",
            remedy="Check 'data.dicom' in site.toml, and that this user may list the folder.",
        ) from None
    found: list[Found] = []
    waiting = [entries]
    while waiting:
        for entry in waiting.pop():
            path = Path(entry.path)
            name = os.fsencode(os.path.relpath(path, real))
            # Whatever the file system says of one entry is about that one alone.
            try:
                if entry.is_symlink():
                    refused = _judge_link(path, real)
                    if refused is not None:
                        found.append(Found(path, name, refused))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(_entries(path))
                elif not entry.is_file(follow_symlinks=False):
                    # A pipe or a device: opening it could block or act.
                    found.append(Found(path, name, Reject.UNREADABLE))
                elif entry.name.upper() != "DICOMDIR":
                    found.append(Found(path, name, root=real))
            except OSError:
                found.append(Found(path, name, Reject.UNREADABLE))
    return tuple(sorted(found, key=lambda one: os.fsencode(one.path)))


def read_file(path: Path, root: Path | None = None) -> bytes:
    """Return the bytes of a found file.

    Args:
        path: where it lies; the last name is no link.
        root: where the file must lie once it is open, for a folder on the way may have become a
            link since it was listed.

    Raises:
        RejectedFile: ``UNREADABLE``, ``OUTSIDE_ROOT`` or ``TOO_LARGE``.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise RejectedFile(Reject.UNREADABLE)
            if root is not None and not _opened(handle).is_relative_to(root):
                raise RejectedFile(Reject.OUTSIDE_ROOT)
            if about.st_size > MAX_FILE_BYTES:
                raise RejectedFile(Reject.TOO_LARGE)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        raise RejectedFile(Reject.UNREADABLE) from None
    if len(data) > MAX_FILE_BYTES:
        raise RejectedFile(Reject.TOO_LARGE)
    return data


def _opened(handle: int) -> Path:
    """Where the file lies that a descriptor is of."""
    return Path(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: PTH115 - no path of ours


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _judge_link(path: Path, root: Path) -> Reject | None:
    try:
        target = path.resolve(strict=False)
        if not target.is_relative_to(root):
            return Reject.OUTSIDE_ROOT
        # A name that is too long, or a folder on the way that may not be entered, raises.
        return None if target.exists() else Reject.UNREADABLE
    except (OSError, RuntimeError):
        return Reject.UNREADABLE
