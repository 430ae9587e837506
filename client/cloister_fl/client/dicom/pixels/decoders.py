"""Pixel decoders: the only path by which hostile bytes reach a decoder.

Runs in a worker process (``worker``), which a decoder may crash or exhaust.

One decoder a family of transfer syntaxes (``DECODERS``) and no fallback: two decoders that disagree
would make a site's images depend on what is installed. libjpeg-turbo (through imagecodecs) reads
the JPEG family, CharLS (pyjpegls) JPEG-LS, OpenJPEG (pylibjpeg-openjpeg) JPEG 2000 and HTJ2K. They
are called by name rather than through pydicom's registry, which logs what a decoder says. RLE's
segments are unpacked by imagecodecs' PackBits and put together here: compiled decoders of whole RLE
frames panic to the terminal or crash on damaged ones.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.codestream import Frame, read_frame
from cloister_fl.client.dicom.header import PixelLayout, silence
from cloister_fl.client.dicom.pixels.known_answers import COLUMNS, ENCODED, ROWS, original
from cloister_fl.client.dicom.rejection import RejectedFile, unfit
from cloister_fl.client.dicom.transfer_syntaxes import (
    HTJ2K,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    NATIVE,
    RLE,
    TRANSFER_SYNTAXES,
    Family,
    TransferSyntax,
)
from cloister_fl.errors import DecoderUnfit, Reject

Stored = NDArray[np.int32]


def decode(data: bytes, transfer_syntax: str, layout: PixelLayout) -> Stored:
    """Decode one frame of a file that passed ``acceptance.precheck``.

    Args:
        data: native pixel bytes, or one encoded frame.
        transfer_syntax: its UID, one of ``transfer_syntaxes.TRANSFER_SYNTAXES``.
        layout: the pixel description of the header.

    Returns:
        Stored values, shape (rows, columns), with the sign that the header tells, within
        ``bits_stored`` bits.

    Raises:
        RejectedFile: ``DECODE_FAILED``, or ``TRANSFER_SYNTAX`` where no decoder is listed for it.
        DecoderUnfit: the decoder fails its known-answer test.
    """
    if transfer_syntax in NATIVE:
        return _native(data, layout)
    check_decoder(transfer_syntax)
    row = TRANSFER_SYNTAXES[transfer_syntax]
    frame = read_frame(data, transfer_syntax, layout)
    values = _run(row, data, frame)
    if values.shape != (layout.rows, layout.columns):
        raise RejectedFile(Reject.DECODE_FAILED)
    if row.lossy and frame.precision > layout.bits_stored:
        # The error of a lossy coding can step over the top; dropping its bit would make it black.
        return _clip(_keep_bits(values, layout, frame.precision), layout)
    return _keep_bits(values, layout, min(frame.precision, layout.bits_stored))


@functools.cache
def check_decoder(transfer_syntax: str) -> None:
    """Decode a known image once a process, before the first image of a syntax is trusted.

    Raises:
        RejectedFile: ``TRANSFER_SYNTAX``, where the syntax is not listed, or nothing is decoded.
        DecoderUnfit: the answer is wrong, no known image is listed for the syntax, or the decoder
            is not installed.
    """
    row = TRANSFER_SYNTAXES.get(transfer_syntax)
    if row is None or transfer_syntax in NATIVE:
        raise RejectedFile(Reject.TRANSFER_SYNTAX)
    wide = 8 if row.depth == 8 else 16
    layout = PixelLayout(ROWS, COLUMNS, wide, row.depth, row.depth - 1, False)
    try:
        data = base64.b64decode(ENCODED[row.known_answer])
        values = _run(row, data, read_frame(data, transfer_syntax, layout))
    except (RejectedFile, KeyError):
        values = np.zeros((0, 0), dtype=np.int32)
    known = original(row.depth)
    if values.shape == known.shape and int(np.abs(values - known).max()) <= row.tolerance:
        return
    raise unfit(transfer_syntax)


def unfit_decoders() -> tuple[str, ...]:
    """Check every decoder; return the transfer syntaxes of those that fail, sorted."""
    failed = []
    for transfer_syntax in sorted(TRANSFER_SYNTAXES.keys() - NATIVE):
        try:
            check_decoder(transfer_syntax)
        except DecoderUnfit:
            failed.append(transfer_syntax)
    return tuple(failed)


def _run(row: TransferSyntax, data: bytes, frame: Frame) -> Stored:
    """Call the pinned decoder; nothing but an array of shape (rows, columns) comes out."""
    try:
        with silence():
            values = np.asarray(DECODERS[row.family](data, frame))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        # BaseException: extensions written in Rust raise panics outside of Exception.
        raise RejectedFile(Reject.DECODE_FAILED) from None
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.dtype.itemsize > 2:
        raise RejectedFile(Reject.DECODE_FAILED)
    return values.astype(np.int32)


def _jpeg(data: bytes, _frame: Frame) -> Any:
    import imagecodecs

    return imagecodecs.jpeg8_decode(data)


def _jpeg_ls(data: bytes, _frame: Frame) -> Any:
    import jpeg_ls

    buffer, info = jpeg_ls.decode_pixel_data(data)
    dtype = "<u1" if info["bits_per_sample"] <= 8 else "<u2"
    return np.frombuffer(buffer, dtype).reshape(info["height"], info["width"])


def _jpeg_2000(data: bytes, frame: Frame) -> Any:
    import openjpeg

    dtype = ("<i" if frame.signed else "<u") + ("1" if frame.precision <= 8 else "2")
    buffer = openjpeg.decode_pixel_data(data, version=2)
    return np.frombuffer(buffer, dtype).reshape(frame.rows, frame.columns)


def _rle(data: bytes, frame: Frame) -> Any:
    """Decode an RLE frame (PS3.5 annex G): one segment a byte of the pixel, the high one first."""
    size = frame.rows * frame.columns
    count, *offsets = struct.unpack_from("<16I", data)
    bounds = [*offsets[:count], len(data)]
    planes = [_plane(data, start, end, size) for start, end in pairwise(bounds)]
    values = np.empty((size, len(planes)), dtype=np.uint8)
    for place, plane in enumerate(reversed(planes)):
        values[:, place] = np.frombuffer(plane, np.uint8)
    pixels = values.view("<u1" if len(planes) == 1 else "<u2")
    return pixels.reshape(frame.rows, frame.columns)


DECODERS: Mapping[Family, Callable[[bytes, Frame], Any]] = {
    JPEG: _jpeg,
    JPEG_LS: _jpeg_ls,
    JPEG_2000: _jpeg_2000,
    HTJ2K: _jpeg_2000,
    RLE: _rle,
}
"""The one decoder of each family: from an encoded frame, and what its header says, to an array of
shape (rows, columns) of integers of one or two bytes."""


def _native(data: bytes, layout: PixelLayout) -> Stored:
    count = layout.rows * layout.columns
    dtype = "<u1" if layout.bits_allocated == 8 else "<u2"
    if len(data) < count * layout.bits_allocated // 8:
        raise RejectedFile(Reject.DECODE_FAILED)
    values = np.frombuffer(data, dtype, count=count).astype(np.int32)
    return _keep_bits(values.reshape(layout.rows, layout.columns), layout, layout.bits_stored)


def _keep_bits(values: Stored, layout: PixelLayout, bits: int) -> Stored:
    """Drop what stands above the lowest ``bits``, then read the sign (PS3.5 section 8.1.1)."""
    kept = values & ((1 << bits) - 1)
    if layout.signed:
        half = 1 << (bits - 1)
        kept = (kept ^ half) - half
    return kept


def _clip(values: Stored, layout: PixelLayout) -> Stored:
    span = 1 << layout.bits_stored
    low = -span // 2 if layout.signed else 0
    return np.clip(values, low, low + span - 1)


def _plane(data: bytes, start: int, end: int, size: int) -> bytes | bytearray:
    """One byte of each pixel. What the compiled decoder will not have is read by our own rules.

    It refuses bytes after the last pixel, which archives leave there; where it answers, it answers
    the same.
    """
    import imagecodecs

    try:
        plane = imagecodecs.packbits_decode(data[start:end], out=bytearray(size))
    except RuntimeError:
        plane = b""
    return plane if len(plane) == size else _unpack_bits(data, start, end, size)


def _unpack_bits(data: bytes, at: int, end: int, size: int) -> bytes:
    """Undo PackBits (PS3.5 section G.3.2) until ``size`` bytes are there, and not one more."""
    out = bytearray()
    while len(out) < size:
        if at + 1 >= end:
            raise RejectedFile(Reject.DECODE_FAILED)
        control = data[at]
        if control < 128:
            if at + 2 + control > end:
                raise RejectedFile(Reject.DECODE_FAILED)
            out += data[at + 1 : at + 2 + control]
            at += 2 + control
        elif control > 128:
            out += data[at + 1 : at + 2] * (257 - control)
            at += 2
        else:
            at += 1
    if len(out) != size:
        raise RejectedFile(Reject.DECODE_FAILED)
    return bytes(out)
