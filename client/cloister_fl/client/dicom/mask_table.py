"""Table of segmentation masks from a worker: the images named, and what is marked in each.

A DICOM Segmentation marks pixels of other images, of one or of a whole series. It names many in
which nothing is marked; of those only the name is kept. The table is as a worker writes it and as
the cache keeps it, one row of units of two bytes; this is the one place that knows its form:

    images u32, marked images u32; of each image, marked ones first, its SOP Instance UID in 64
    bytes; of each marked one its position, three float64; of each marked one its mask in bits
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom import geometry

Mask = NDArray[np.uint8]
Table = NDArray[np.uint16]

MODALITY = "SEG"
"""The Modality of a segmentation (PS3.3 C.8.20.1)."""

_COUNTS = struct.Struct("<II")
_UID_BYTES = 64
_UID = re.compile(rb"[0-9.]{1,64}")  # PS3.5 section 9.1
_POSITION = struct.Struct("<3d")
_UNTOLD = (math.nan, math.nan, math.nan)


class InvalidTable(Exception):
    """A table that no sound worker writes; says nothing of it."""


@dataclass(frozen=True, eq=False)
class Marking:
    """What a segmentation says of one image.

    Attributes:
        mask: uint8 (size, size) of 0 and 1; None where nothing is marked in the image.
        position: where the marked frame lies, as ``geometry.text_of``; empty where it is not told.
    """

    mask: Mask | None = field(default=None, repr=False)
    position: str = field(default="", repr=False)


def longest(size: int, images: int, marked: int) -> int:
    """Bytes of a table."""
    bits = 2 * -(-size * size // 16)
    return _COUNTS.size + images * _UID_BYTES + marked * (_POSITION.size + bits)


def pack(found: Mapping[str, Marking]) -> Table:
    """Write masks by SOP Instance UID; at least one."""
    marked = {uid: one for uid, one in found.items() if one.mask is not None}
    ordered = [*marked, *(uid for uid in found if uid not in marked)]
    table = bytearray(_COUNTS.pack(len(ordered), len(marked)))
    for uid in ordered:
        table += uid.encode("ascii").ljust(_UID_BYTES, b"\0")
    for one in marked.values():
        table += _POSITION.pack(*(geometry.numbers(one.position, 3) or _UNTOLD))
    for one in marked.values():
        assert one.mask is not None
        bits = np.packbits(one.mask).tobytes()
        table += bits + b"\0" * (len(bits) % 2)
    return np.frombuffer(bytes(table), "<u2").astype(np.uint16).reshape(1, -1)


class Masks:
    """A table that was judged. Masks stay bits until they are asked for.

    Args:
        table: what ``pack`` made.
        size: side of the masks.

    Raises:
        InvalidTable: it has another length, or its UIDs are none or not distinct.
    """

    def __init__(self, table: Table, size: int) -> None:
        raw = table.astype("<u2").tobytes()
        if len(raw) < _COUNTS.size:
            raise InvalidTable
        count, self._marked = _COUNTS.unpack_from(raw)
        if not count >= 1 or self._marked > count or longest(size, count, self._marked) != len(raw):
            raise InvalidTable
        self._raw = raw
        self._size = size
        self._places = {
            _uid(raw[at : at + _UID_BYTES]): place
            for place, at in enumerate(
                range(_COUNTS.size, _COUNTS.size + count * _UID_BYTES, _UID_BYTES)
            )
        }
        if len(self._places) != count:
            raise InvalidTable
        self._positions = _COUNTS.size + count * _UID_BYTES

    @property
    def uids(self) -> Collection[str]:
        """SOP Instance UIDs of the images."""
        return self._places.keys()

    def marking(self, uid: str) -> Marking:
        """What it says of an image that it names."""
        place = self._places[uid]
        if place >= self._marked:
            return Marking()
        position = _POSITION.unpack_from(self._raw, self._positions + place * _POSITION.size)
        length = 2 * -(-(self._size**2) // 16)
        at = self._positions + self._marked * _POSITION.size + place * length
        bits = np.frombuffer(self._raw, np.uint8, length, at)
        mask = np.unpackbits(bits, count=self._size**2).reshape(self._size, self._size)
        return Marking(mask, geometry.text_of(position, 3))

    def whole(self, marking: Marking) -> Mask:
        """The mask of a mask, also where nothing is marked."""
        shape = (self._size, self._size)
        return np.zeros(shape, np.uint8) if marking.mask is None else marking.mask


def _uid(raw: bytes) -> str:
    uid = raw.rstrip(b"\0")
    if not _UID.fullmatch(uid):
        raise InvalidTable
    return uid.decode("ascii")
