"""Size check of compressed codestreams, before a decoder believes it.

A header of 512 x 512 over a codestream of 60,000 x 60,000 has killed decoders at 22 GB. The frame
header of each family is a few fixed bytes, and has a reader here: JPEG (ITU-T T.81 B.2.2), JPEG-LS
(T.87 C.2.2), JPEG 2000 and HTJ2K (T.800 A.5.1), RLE (PS3.5 annex G).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import (
    HTJ2K,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    RLE,
    TRANSFER_SYNTAXES,
    Family,
    TransferSyntax,
)
from cloister_fl.errors import Reject

MAX_TILES = 4096
"""Most tiles of a JPEG 2000 image; a 64-megapixel image in tiles of 128 has as many."""

# Of every JPEG coding (T.81 table B.1) but DHT, JPG and DAC, and of JPEG-LS (T.87 C.1.1).
_ANY_FRAME = (frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}


@dataclass(frozen=True)
class Frame:
    """What a codestream says of itself; ``precision`` in bits, 2 to 16."""

    rows: int
    columns: int
    precision: int
    signed: bool = False


def check_codestream(data: bytes, transfer_syntax: str, layout: PixelLayout) -> None:
    """Compare an encoded frame with the header of its file.

    Raises:
        RejectedFile: ``PIXEL_FORMAT`` where they contradict each other, ``DECODE_FAILED`` where
            there is no such codestream, ``TRUNCATED`` where its end is missing,
            ``TRANSFER_SYNTAX`` where the syntax is not listed.
    """
    frame = read_frame(data, transfer_syntax, layout)
    if (frame.rows, frame.columns) != (layout.rows, layout.columns):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    if not 2 <= frame.precision <= layout.bits_allocated:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    # Decoders fill what is cut off with grey, in silence. One byte of padding is allowed (A.4).
    if not data.rstrip(b"\0").endswith(TRANSFER_SYNTAXES[transfer_syntax].family.end):
        raise RejectedFile(Reject.TRUNCATED)


def read_frame(data: bytes, transfer_syntax: str, layout: PixelLayout) -> Frame:
    """Read the frame header of a codestream of one component.

    Args:
        data: one encoded frame.
        transfer_syntax: its UID.
        layout: the header of its file, for codings whose frames do not tell their size.

    Raises:
        RejectedFile: ``DECODE_FAILED``, ``COLOUR``, ``PIXEL_FORMAT``, ``TRUNCATED`` or
            ``TOO_LARGE``; ``TRANSFER_SYNTAX`` where the syntax is not listed.
    """
    row = TRANSFER_SYNTAXES.get(transfer_syntax)
    if row is None or row.family not in READERS:
        raise RejectedFile(Reject.TRANSFER_SYNTAX)
    try:
        return READERS[row.family](data, row, layout)
    except (struct.error, IndexError):
        raise RejectedFile(Reject.DECODE_FAILED) from None


def _jpeg(data: bytes, row: TransferSyntax, _layout: PixelLayout) -> Frame:
    if data[:2] != b"\xff\xd8":
        raise RejectedFile(Reject.DECODE_FAILED)
    at = 2
    while True:
        if data[at] != 0xFF:
            raise RejectedFile(Reject.DECODE_FAILED)
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _ANY_FRAME:
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2 or marker in (0xD8, 0xD9, 0xDA):
            raise RejectedFile(Reject.DECODE_FAILED)
        at += 2 + length
    if marker not in row.markers:
        raise RejectedFile(Reject.DECODE_FAILED)
    precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 4)
    if components != 1:
        raise RejectedFile(Reject.COLOUR)
    return Frame(rows, columns, precision)


def _jpeg_2000(data: bytes, _row: TransferSyntax, _layout: PixelLayout) -> Frame:
    if data[:4] != b"\xff\x4f\xff\x51":
        raise RejectedFile(Reject.DECODE_FAILED)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = (
        struct.unpack_from(">8IH", data, 8)
    )
    if components != 1:
        raise RejectedFile(Reject.COLOUR)
    depth, step_x, step_y = struct.unpack_from(">3B", data, 42)
    if (left, top, tile_left, tile_top, step_x, step_y) != (0, 0, 0, 0, 1, 1):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    if not tile_width or not tile_height:
        raise RejectedFile(Reject.DECODE_FAILED)
    if -(-right // tile_width) * -(-bottom // tile_height) > MAX_TILES:
        raise RejectedFile(Reject.TOO_LARGE)
    return Frame(bottom, right, (depth & 0x7F) + 1, bool(depth & 0x80))


def _rle(data: bytes, _row: TransferSyntax, layout: PixelLayout) -> Frame:
    """Check the header: as many segments as a pixel has bytes, one behind the other."""
    if len(data) < 64:
        raise RejectedFile(Reject.TRUNCATED)
    count, *offsets = struct.unpack_from("<16I", data)
    if count != layout.bits_allocated // 8:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    bounds = [*offsets[:count], len(data)]
    if bounds[0] != 64 or any(a >= b for a, b in pairwise(bounds)):
        raise RejectedFile(Reject.DECODE_FAILED)
    return Frame(layout.rows, layout.columns, layout.bits_allocated)


READERS: Mapping[Family, Callable[[bytes, TransferSyntax, PixelLayout], Frame]] = {
    JPEG: _jpeg,
    JPEG_LS: _jpeg,
    JPEG_2000: _jpeg_2000,
    HTJ2K: _jpeg_2000,
    RLE: _rle,
}
"""What reads the frame header of each family, a few fixed bytes, before its decoder sees it."""
