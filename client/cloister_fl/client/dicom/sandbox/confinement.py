"""Confinement of a process that reads hostile files: drop what it has no need of (Linux).

Two steps, for a process needs its libraries before it can do without files: ``confine`` before
they are loaded, ``seal`` before the first hostile byte. What the system does not allow is left
out where a comment says so; the limits on memory and time are not optional.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from cloister_fl.client.dicom.size_limits import ADDRESS_SPACE_BYTES, CPU_SECONDS

# <linux/prctl.h>, <linux/sched.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


def confine(parent: int) -> None:
    """Limit memory, time and output; leave the network; die with the parent.

    Args:
        parent: process id of the parent, for it may have died before its death was waited for.

    Raises:
        OSError: a limit cannot be set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, ADDRESS_SPACE_BYTES)
    renew_cpu()
    libc = ctypes.CDLL(None, use_errno=True)
    # A network of its own, which is empty. Root may have it at once, others with a user namespace;
    # containers and some distributions deny both.
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    # Not dumpable: another worker, which may have been taken over, cannot trace this one.
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_DUMPABLE, 0),
        # Last: a change of credentials clears it.
        (_PR_SET_PDEATHSIG, int(signal.SIGKILL)),
    ):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def seal() -> None:
    """Open nothing and start nothing from now on; what is open stays so.

    Raises:
        OSError: a limit cannot be set.
    """
    sys.meta_path.insert(0, _NoMoreModules())
    # No descriptor below zero exists, so no file, socket or pipe can be opened.
    _limit(resource.RLIMIT_NOFILE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    # Root could raise its limits again, so it becomes a user like others: version 3 of the
    # header, this process, and three empty sets of twice 32 bits.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def renew_cpu() -> None:
    """Allow ``CPU_SECONDS`` from now on; the kernel kills a process that needs more."""
    soft = math.ceil(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


class _NoMoreModules:
    """Answers every import of what is not loaded, before the loader trips over closed doors.

    A file's character set can be any word, and Python looks for a codec of that name.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise ModuleNotFoundError(name=name)
