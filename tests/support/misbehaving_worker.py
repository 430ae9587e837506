"""A worker that does on request what a worker must never do; started by name, never imported.

A file that begins with ``do:`` names the deed; any other file is read as the product reads it.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from typing import NoReturn

from cloister_fl.client.dicom import facts
from cloister_fl.client.dicom.sandbox import ipc, worker
from cloister_fl.errors import Reject

channel: socket.socket
serial = 0

# ruff: noqa: PLW0603 - a process of its own, with one of each


def main() -> NoReturn:
    global channel
    channel, inbox, outbox = worker.enter()
    from cloister_fl.client.dicom import acceptance

    sound = acceptance.precheck

    def wrapped(
        data: bytes, modalities: Collection[str], *, released: bool = False
    ) -> acceptance.Checked:
        global serial
        serial += 1
        if data.startswith(b"do:"):
            DEEDS[data[3:].decode()]()
        return sound(data, modalities, released=released)

    acceptance.precheck = wrapped
    worker.serve(channel, inbox, outbox)


def _facts(**changes: str | int) -> facts.Facts:
    sound = {
        "sop_instance": "1.2.3",
        "accession": "",
        "patient_id": "P",
        "issuer": "",
        "person": "",
    }
    about = {"rows": 4, "columns": 4, "pixels": "ab" * 32, "modality": "DX"}
    about |= {"manufacturer": "", "year": "", "person": ""}
    return facts.Facts(**{**about, **sound, **changes})  # type: ignore[arg-type]


def _say(message: bytes) -> None:
    channel.send(message)
    # What follows would be a second answer.
    time.sleep(600)


def _twice() -> None:
    """Answer now, and let the honest answer to the same file stand for the next one."""
    channel.send(ipc.pack_facts(serial, _facts()))
    raise ValueError


def _spin() -> None:
    while True:
        pass


def _compute() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1 + int(time.process_time()), -1))
    _spin()


def _map() -> None:
    held = []
    while True:
        held.append(mmap.mmap(-1, 64 << 20))


def _close() -> None:
    os.close(channel.fileno())
    time.sleep(600)


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)


def _resize() -> None:
    """Try to cut the memory from which the image is read."""
    os.ftruncate(int(sys.argv[3]), 0)


class _Panic(BaseException):
    """What an extension in Rust raises."""


def _panic() -> None:
    raise _Panic


def _capabilities() -> int:
    import ctypes

    sets = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) == 0
    return sum(sets)


def _attempt(deed: Callable[[], object]) -> str:
    try:
        deed()
    except BaseException as error:
        return type(error).__name__
    return "done"


def _tell() -> None:
    """Say in the place of an accession number what this process can do."""
    told = {
        "open": _attempt(lambda: os.open("/etc/passwd", os.O_RDONLY)),
        "write": _attempt(lambda: os.open("/tmp/planted", os.O_WRONLY | os.O_CREAT)),
        "socket": _attempt(socket.socket),
        "fork": _attempt(os.fork) if os.getuid() else "OSError",
        "raise": _attempt(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))),
        "import": _attempt(lambda: __import__("wave")),
        "grow": _attempt(lambda: os.ftruncate(int(sys.argv[2]), 1 << 30)),
        "capabilities": _capabilities(),
        "modules": sorted({"torch", "flwr", "pydantic", "requests"} & _loaded()),
        "environment": sorted(os.environ),
        "limits": [
            resource.getrlimit(which)[1]
            for which in (resource.RLIMIT_AS, resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)
        ],
        "cpu": resource.getrlimit(resource.RLIMIT_CPU)[0] - int(time.process_time()),
        "session": os.getsid(0) == os.getpid(),
    }
    _say(ipc.pack_facts(serial, _facts(accession=json.dumps(told))))


def _loaded() -> set[str]:
    return {name for name, module in sys.modules.items() if module is not None}


DEEDS: dict[str, Callable[[], object]] = {
    "segfault": _crash,
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "sys-exit": lambda: sys.exit(3),
    "memory": lambda: bytearray(3 << 30),
    "map": _map,
    "recursion": lambda: _recurse(0),
    "panic": _panic,
    "spin": _spin,
    "sleep": lambda: time.sleep(600),
    "compute": _compute,
    "close": _close,
    "resize": _resize,
    "tell": _tell,
    "twice": _twice,
    "empty": lambda: _say(b""),
    "garbage": lambda: _say(bytes(range(256))),
    "oversized": lambda: _say(bytes(ipc.MAX_MESSAGE + 1)),
    "wrong-serial": lambda: _say(ipc.pack_facts(serial + 1, _facts())),
    "unknown-code": lambda: _say(ipc.pack_reject(serial, Reject.NOT_DICOM)[:-1] + b"?"),
    "not-a-reject": lambda: _say(ipc.pack_reject(serial, Reject.NOT_DICOM)[:-7] + b"CLO-101"),
    "not-its-code": lambda: _say(ipc.pack_reject(serial, Reject.DUPLICATE)),
    "unfit": lambda: _say(ipc.pack_unfit(serial, "1.2.840.10008.1.2.4.80")),
    "other-modality": lambda: _say(ipc.pack_facts(serial, _facts(modality="MR"))),
    "no-patient": lambda: _say(ipc.pack_facts(serial, _facts(patient_id=""))),
    "no-uid": lambda: _say(ipc.pack_facts(serial, _facts(sop_instance="=cmd|' /C calc'!A0"))),
    "no-rows": lambda: _say(ipc.pack_facts(serial, _facts(rows=0))),
    "too-many-pixels": lambda: _say(ipc.pack_facts(serial, _facts(rows=1 << 20, columns=65))),
    "no-text": lambda: _say(ipc.pack_facts(serial, _facts(accession="~"))[:-2] + b"\xffP"),
    "cut": lambda: _say(ipc.pack_facts(serial, _facts())[:-1]),
    "longer": lambda: _say(ipc.pack_facts(serial, _facts()) + b"x"),
}


def _recurse(depth: int) -> int:
    return _recurse(depth + 1)
