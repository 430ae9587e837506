"""UNIX socket in a folder of mode 0700: bound and reached by the processes of one user alone.

The folder is opened first and judged by its descriptor, and what is done with the socket is done
below that descriptor, as ``/proc/self/fd/N``: nobody can put another folder into its place between
the look and the use, and the folder's path may be longer than the 107 bytes that a socket's
address holds (unix(7)). The kernel says which user is at the other end (``SO_PEERCRED``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from cloister_fl.errors import LocalSocketRefused

BACKLOG = 16
"""Connections that wait to be accepted: our own processes open a few."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOCKET = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CREDENTIALS = struct.Struct("iII")
"""``struct ucred``: process, user, group."""


def listen(folder: Path, name: str) -> socket.socket:
    """Listen on the socket ``name`` of a private folder; only its user can connect.

    It takes the place of a socket that a killed process left, and at once: whoever connects meets
    the old one or the new one. Only one process may do this at a time; see ``pid_lock``.

    Raises:
        LocalSocketRefused: the folder is open to others, something other than a socket of this
            user bears the name, or the system makes no socket there.
    """
    fresh = f"{name}.new"
    with _working_in(folder), _opened(folder) as below:
        with contextlib.suppress(FileNotFoundError):
            _require_own_socket(folder, name, os.lstat(name, dir_fd=below))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=below)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The file gets the mode of the descriptor, whatever the umask.
            os.fchmod(bound.fileno(), 0o600)
            bound.bind(f"/proc/self/fd/{below}/{fresh}")
            bound.listen(BACKLOG)
            os.rename(fresh, name, src_dir_fd=below, dst_dir_fd=below)
        except BaseException:
            bound.close()
            raise
    return bound


def connect(folder: Path, name: str, timeout_s: float | None) -> socket.socket:
    """Connect to the socket ``name`` of a private folder, if a process of this user listens.

    Raises:
        LocalSocketRefused: the folder is open to others, something other than a socket of this
            user bears the name, or a process of another user listens.
        OSError: nobody listens.
    """
    with _opened(folder) as below:
        # Not followed: what bears the name is the socket itself, or refused.
        found = os.open(name, _SOCKET, dir_fd=below)
        try:
            _require_own_socket(folder, name, os.fstat(found))
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                line.settimeout(timeout_s)
                line.connect(f"/proc/self/fd/{found}")
                if not is_own(line):
                    raise _refused(
                        f"A process of another user answers at {folder / name}.",
                        "Nothing was sent to it.",
                        "Find it, and end it: ss -xlp",
                    )
            except BaseException:
                line.close()
                raise
        finally:
            os.close(found)
    return line


def is_own(line: socket.socket) -> bool:
    """Whether the process at the other end of a UNIX socket is one of this user's."""
    told = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(told)
    return bool(user == os.geteuid())


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Yield the descriptor of a folder that is this user's alone."""
    handle = os.open(folder, _FOLDER)
    try:
        about = os.fstat(handle)
        if about.st_uid != os.geteuid():
            raise _refused(
                f"{folder} belongs to another user.",
                "That user could take the place of a process of Cloister.",
                "Run as the user who owns it, or give it back, as root: "
                f"chown {os.geteuid()} {shlex.quote(str(folder))}",
            )
        if about.st_mode & 0o077:
            raise _refused(
                f"{folder} can be used by others (mode {stat.S_IMODE(about.st_mode):04o}).",
                "They could take the place of a process of Cloister.",
                f"Run: chmod 700 {shlex.quote(str(folder))}",
            )
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Turn what the system says into an error with a number."""
    try:
        yield
    except OSError as error:
        raise _refused(
            f"No socket can be made in {folder}.",
            (error.strerror or "The system gave no reason") + ".",
            "The folder must lie on a local file system of Linux, with space, and /proc must be "
            f"mounted. See: df {shlex.quote(str(folder))}",
        ) from None


def _require_own_socket(folder: Path, name: str, about: os.stat_result) -> None:
    if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.geteuid():
        where = folder / name
        raise _refused(
            f"{where} is not a socket of this user.",
            "Somebody put something else there.",
            f"Move it away: mv {shlex.quote(str(where))} {shlex.quote(str(where) + '.old')}",
        )


def _refused(what: str, why: str, remedy: str) -> LocalSocketRefused:
    return LocalSocketRefused(what, why=why, remedy=remedy)
