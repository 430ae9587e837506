"""Size check of compressed codestreams, before a decoder believes it.

A header of 512 x 512 over a codestream of 60,000 x 60,000 has killed decoders at 22 GB. The frame
header of each coding is a few fixed bytes: JPEG (ITU-T T.81 B.2.2), JPEG-LS (T.87 C.2.2),
JPEG 2000 and HTJ2K (T.800 A.5.1), RLE (PS3.5 annex G).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.errors import Reject

RLE = "1.2.840.10008.1.2.5"
MAX_TILES = 4096
"""Most tiles of a JPEG 2000 image; a 64-megapixel image in tiles of 128 has as many."""

_BASELINE, _EXTENDED, _LOSSLESS, _LS = 0xC0, 0xC1, 0xC3, 0xF7
_FRAMES = {
    "1.2.840.10008.1.2.4.50": frozenset((_BASELINE,)),
    "1.2.840.10008.1.2.4.51": frozenset((_BASELINE, _EXTENDED)),
    "1.2.840.10008.1.2.4.57": frozenset((_LOSSLESS,)),
    "1.2.840.10008.1.2.4.70": frozenset((_LOSSLESS,)),
    "1.2.840.10008.1.2.4.80": frozenset((_LS,)),
    "1.2.840.10008.1.2.4.81": frozenset((_LS,)),
}
_JPEG_2000 = frozenset(
    (
        "1.2.840.10008.1.2.4.90",
        "1.2.840.10008.1.2.4.91",
        "1.2.840.10008.1.2.4.201",
        "1.2.840.10008.1.2.4.202",
        "1.2.840.10008.1.2.4.203",
    )
)
_ANY_FRAME = (frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {_LS}


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
            ``TRANSFER_SYNTAX`` where the syntax is not listed here.
    """
    if transfer_syntax == RLE:
        _rle(data, layout)
        return
    frame = read_frame(data, transfer_syntax)
    if (frame.rows, frame.columns) != (layout.rows, layout.columns):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    if not 2 <= frame.precision <= layout.bits_allocated:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    # Decoders fill what is cut off with grey, in silence. One byte of padding is allowed (A.4).
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise RejectedFile(Reject.TRUNCATED)


def read_frame(data: bytes, transfer_syntax: str) -> Frame:
    """Read the frame header of a JPEG, JPEG-LS or JPEG 2000 codestream of one component.

    Raises:
        RejectedFile: ``DECODE_FAILED``, ``COLOUR``, ``PIXEL_FORMAT`` or ``TOO_LARGE``;
            ``TRANSFER_SYNTAX`` where the syntax is not listed here.
    """
    try:
        if transfer_syntax in _FRAMES:
            return _jpeg(data, _FRAMES[transfer_syntax])
        if transfer_syntax in _JPEG_2000:
            return _jpeg2000(data)
    except (struct.error, IndexError):
        raise RejectedFile(Reject.DECODE_FAILED) from None
    raise RejectedFile(Reject.TRANSFER_SYNTAX)


def _jpeg(data: bytes, expected: frozenset[int]) -> Frame:
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
    if marker not in expected:
        raise RejectedFile(Reject.DECODE_FAILED)
    precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 4)
    if components != 1:
        raise RejectedFile(Reject.COLOUR)
    return Frame(rows, columns, precision)


def _jpeg2000(data: bytes) -> Frame:
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


def _rle(data: bytes, layout: PixelLayout) -> None:
    """Check the header: as many segments as a pixel has bytes, one behind the other."""
    if len(data) < 64:
        raise RejectedFile(Reject.TRUNCATED)
    count, *offsets = struct.unpack_from("<16I", data)
    if count != layout.bits_allocated // 8:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    bounds = [*offsets[:count], len(data)]
    if bounds[0] != 64 or any(a >= b for a, b in pairwise(bounds)):
        raise RejectedFile(Reject.DECODE_FAILED)
