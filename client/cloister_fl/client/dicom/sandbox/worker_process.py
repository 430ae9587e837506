"""Handle of one worker process, in the process with the data: start, ask, replace.

A clean interpreter is started, never a fork: this process may hold threads, keys and patients.
The worker inherits three descriptors, no variable but those named here, and no terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom import facts, mask_table
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox import ipc
from cloister_fl.client.dicom.size_limits import MAX_OUT_BYTES, WALL_SECONDS
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Input
from cloister_fl.system.module_path import path_of_children

WORKER = "cloister_fl.client.dicom.sandbox.worker"
SEGMENTATION_WORKER = "cloister_fl.client.dicom.sandbox.segmentation_worker"
START_SECONDS = 60.0
"""How long a worker may take to load and prove its decoders; half a second where nothing else
runs."""
MAX_FILES = 2000
"""After so many files a worker is replaced, whatever it has leaked or learned."""

_KEPT_BYTES = 32 << 20
"""How much of the memory for files is kept between them."""
_END_SECONDS = 1.0

# -I and -S: neither the environment nor the folder decides what is imported, only the path that
# this process has.
_OPTIONS = ("-I", "-S", "-B", "-X", "utf8", "-W", "ignore")
_START = (
    "import sys; sys.path[:] = sys.argv[6:]; "
    "from importlib import import_module; import_module(sys.argv[5]).main()"
)
_VARIABLES = {
    # Threads of the linear algebra would eat the address space that is meant for images.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # A decoder asks for the same megabytes for each file; to map them anew is a third of its time.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


class NotStarted(Exception):
    """A worker died, or said nothing sensible, before it had met a file."""


class NotAsked(Exception):
    """A worker was gone before it could be given the file."""


class Worker:
    """A running worker. Use it from the thread that makes it: it ends with that thread.

    Args:
        module: whose ``main`` it runs.

    Raises:
        NotStarted: it does not come up.
    """

    def __init__(self, module: str = WORKER) -> None:
        self._serial = 0
        self._kept = 0
        self._held = contextlib.ExitStack()
        try:
            self._inbox = self._memory("file", 0)
            self._outbox = self._memory("image", MAX_OUT_BYTES)
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._held.enter_context(self._channel)
            with theirs:
                self._process = _start(module, theirs.fileno(), self._inbox, self._outbox)
        except OSError:
            self._held.close()
            raise NotStarted from None
        self._alive = True
        try:
            self._unfit = ipc.parse_hello(self._receive(START_SECONDS))
        except (TimeoutError, ipc.InvalidMessage):
            self.stop()
            raise NotStarted from None

    @property
    def worn(self) -> bool:
        """Whether it has read as many files as it should."""
        return self._serial >= MAX_FILES

    def ask(
        self, data: bytes, spec: Input, *, released: bool = False, segment: str = ""
    ) -> tuple[facts.Facts, NDArray[np.uint16]]:
        """Have one file read, within ``WALL_SECONDS``.

        Args:
            data: the file.
            spec: the study's input.
            released: as for ``acceptance.precheck``.
            segment: what is asked of segmentations; empty where they are not read.

        Returns:
            What is known of the image, and its shades (size, size); or of a segmentation, and its
            table (see ``mask_table``).

        Afterwards ``alive`` tells whether the worker can be asked again.

        Raises:
            RejectedFile: the file is turned away.
            DecoderUnfit: a decoder fails its known-answer test.
            NotAsked: the worker was gone before.
        """
        self._serial += 1
        request = ipc.Request(
            serial=self._serial,
            length=len(data),
            modalities=spec.modalities,
            size=spec.size,
            windowing=spec.windowing,
            percentiles=spec.percentiles,
            window=spec.window,
            released=released,
            segment=segment,
        )
        try:
            self._put(data)
        except OSError:
            # The machine has no memory left for it.
            self.stop()
            raise RejectedFile(Reject.EXHAUSTED) from None
        try:
            self._channel.send(ipc.pack_request(request))
        except OSError:
            self.stop()
            raise NotAsked from None
        try:
            message = self._receive(WALL_SECONDS)
        except TimeoutError:
            self.stop()
            raise RejectedFile(Reject.EXHAUSTED) from None
        if not message:
            raise RejectedFile(self._epitaph())
        try:
            facts, length = ipc.parse_answer(message, request, self._unfit)
            if length:
                return facts, self._table(length, spec.size)
        except RejectedFile as rejected:
            if rejected.reason is Reject.EXHAUSTED:
                # What is left of its memory may be in shreds.
                self.stop()
            raise
        except (ipc.InvalidMessage, mask_table.InvalidTable):
            self.stop()
            raise RejectedFile(Reject.DECODE_FAILED) from None
        return facts, self._taken(spec.size, spec.size)

    def _taken(self, rows: int, columns: int) -> NDArray[np.uint16]:
        # Read, not mapped: what it writes later changes nothing here.
        content = os.pread(self._outbox, 2 * rows * columns, 0)
        return np.frombuffer(content, "<u2").astype(np.uint16).reshape(rows, columns)

    def _table(self, length: int, size: int) -> mask_table.Table:
        table = self._taken(1, length // 2)
        mask_table.Masks(table, size)
        return table

    @property
    def alive(self) -> bool:
        """Whether it can be asked, and has to be stopped in the end."""
        return self._alive

    def kill(self) -> None:
        """End it, from any thread; ``stop`` still has to follow in its own."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def stop(self) -> None:
        """End it and give back what it holds."""
        if self._alive:
            self._alive = False
            self.kill()
            self._process.wait()
            self._held.close()

    def _memory(self, name: str, size: int) -> int:
        """Make memory that can be shared; one of a fixed size can never be cut under a reader."""
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._held.callback(os.close, descriptor)
        if size:
            os.ftruncate(descriptor, size)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return descriptor

    def _put(self, data: bytes) -> None:
        if self._kept > _KEPT_BYTES:
            os.ftruncate(self._inbox, 0)
            self._kept = 0
        view, at = memoryview(data), 0
        while at < len(view):
            at += os.pwrite(self._inbox, view[at:], at)
        self._kept = max(self._kept, len(data))

    def _receive(self, seconds: float) -> bytes:
        self._channel.settimeout(seconds)
        try:
            # One byte more than is allowed, so that what is cut off is seen.
            return self._channel.recv(ipc.MAX_MESSAGE + 1)
        except TimeoutError:
            raise
        except OSError:
            return b""

    def _epitaph(self) -> Reject:
        """Tell from its end what the file did to it."""
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            # It closed the door and lives on.
            status = None
        self.stop()
        # The kernel kills what computes too long, and what takes a machine's last memory.
        exhausted = status in (-signal.SIGKILL, -signal.SIGXCPU)
        return Reject.EXHAUSTED if exhausted else Reject.DECODE_FAILED


def _start(module: str, channel: int, inbox: int, outbox: int) -> subprocess.Popen[bytes]:
    variables = dict(_VARIABLES)
    if "LD_LIBRARY_PATH" in os.environ:
        # Some interpreters find their own libraries by it.
        variables["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    handed = (channel, inbox, outbox)
    words = [str(number) for number in (*handed, os.getpid())]
    return subprocess.Popen(  # noqa: S603 - our own interpreter, our own code
        [sys.executable, *_OPTIONS, "-c", _START, *words, module, *path_of_children()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=variables,
        cwd="/",
        pass_fds=handed,
        # An interrupt at the keyboard is for this process alone; it ends its workers itself.
        start_new_session=True,
    )
