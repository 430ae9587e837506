"""Worker process in which files are parsed and decoded, and which they may crash or exhaust.

Started by ``pool`` in a clean interpreter, with three descriptors (a socket of datagrams, the
memory with the file, the memory for the image) and the parent's process id as arguments. Reads
one file after another until the socket closes. Loads neither torch nor anything that trains. See
``ipc`` for what it says, ``confinement`` for what it may.
"""

from __future__ import annotations

import codecs
import contextlib
import mmap
import os
import socket
import sys
from typing import NoReturn

from cloister_fl.client.dicom.sandbox.confinement import confine, renew_cpu, seal
from cloister_fl.system.libraries.logs import silence_libraries


def main() -> NoReturn:
    """Serve until the parent is gone."""
    serve(*enter())


def enter() -> tuple[socket.socket, int, int]:
    """Take the arguments, ``sys.argv[1:5]``, and the limits; return what ``serve`` needs."""
    channel, inbox, outbox, parent = (int(word) for word in sys.argv[1:5])
    # First: what is loaded counts towards the limits, and has no network.
    confine(parent)
    silence_libraries()
    return socket.socket(fileno=channel), inbox, outbox


def serve(
    channel: socket.socket, inbox: int, outbox: int, *, segmentations: bool = False
) -> NoReturn:
    """Load the decoders, prove them, close the doors, and answer requests.

    Args:
        channel: where requests come from and answers go.
        inbox: descriptor of the memory that holds the file of the request.
        outbox: descriptor of the memory for the shades or the table of masks, two bytes each,
            little endian.
        segmentations: whether to load what reads segmentations.
    """
    # pydicom would load a client for HTTP, which has no business here.
    sys.modules["requests"] = None  # type: ignore[assignment]
    import numpy as np

    from cloister_fl.client.dicom.acceptance import judge_preamble, precheck
    from cloister_fl.client.dicom.image import read_image
    from cloister_fl.client.dicom.pixels.decoders import unfit_decoders
    from cloister_fl.client.dicom.rejection import SEGMENTATION, RejectedFile
    from cloister_fl.client.dicom.sandbox import ipc
    from cloister_fl.client.dicom.size_limits import MAX_OUT_BYTES
    from cloister_fl.errors import Reject

    unfit = frozenset(unfit_decoders())
    _load_character_sets()
    if segmentations:
        from cloister_fl.client.dicom.masks import segmentation

        unfit |= frozenset() if segmentation.sound() else {SEGMENTATION}
    out = np.frombuffer(mmap.mmap(outbox, MAX_OUT_BYTES), "<u2")

    def segmented(request: ipc.Request, data: bytes) -> bytes:
        # A segmentation that is held stays so: nobody can look at one and tell what it hides.
        judge_preamble(data, released=False)
        if SEGMENTATION in unfit:
            return ipc.pack_unfit(request.serial, SEGMENTATION)
        facts, table = segmentation.read_segmentation(data, request)
        out[: table.size] = table.ravel()
        return ipc.pack_masks(request.serial, facts, table.nbytes)

    def answer(request: ipc.Request) -> bytes:
        try:
            data = os.pread(inbox, request.length, 0)
            try:
                checked = precheck(data, request.modalities, released=request.released)
            except RejectedFile as rejected:
                if rejected.reason is not Reject.SOP_CLASS or not request.segment:
                    raise
                return segmented(request, data)
            if checked.transfer_syntax in unfit:
                return ipc.pack_unfit(request.serial, checked.transfer_syntax)
            facts, image = read_image(checked, request)
            said = ipc.pack_facts(request.serial, facts)
            out[: image.size] = image.ravel()
            return said
        except RejectedFile as rejected:
            return ipc.pack_reject(request.serial, rejected.reason)
        except MemoryError:
            return ipc.pack_reject(request.serial, Reject.EXHAUSTED)
        except BaseException:
            # BaseException: extensions written in Rust raise panics outside of Exception.
            return ipc.pack_reject(request.serial, Reject.DECODE_FAILED)

    seal()
    channel.send(ipc.pack_hello(unfit))
    while message := channel.recv(ipc.MAX_MESSAGE):
        renew_cpu()
        channel.send(answer(ipc.parse_request(message)))
    os._exit(0)


def _load_character_sets() -> None:
    """Load the codecs that a file may name, for none can be loaded later."""
    from pydicom.charset import python_encoding

    for name in sorted({*python_encoding.values(), "ascii", "cp1251", "cp1252", "utf-8"}):
        # The standard's names include some that Python knows only in another spelling.
        with contextlib.suppress(LookupError):
            codecs.lookup(name)
