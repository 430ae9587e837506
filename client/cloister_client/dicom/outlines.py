"""Outlines on their way from a worker: a table with a row an image, its UID and its mask in bits.

A DICOM Segmentation marks pixels of other images, of one or of a whole series, so what is read of
it is a mask for each of them. The table is as a worker writes it and as the cache keeps it; this
is the one place that knows its form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]
Table = NDArray[np.uint16]

MODALITY = "SEG"
"""The Modality of a segmentation (PS3.3 C.8.20.1)."""

_UID_BYTES = 64
_UID = re.compile(rb"[0-9.]{1,64}")  # PS3.5 section 9.1


class InvalidTable(Exception):
    """A table that no sound worker writes; says nothing of it."""


def words(size: int) -> int:
    """Length of a row, in units of two bytes, for masks of side ``size``."""
    return _UID_BYTES // 2 + -(-size * size // 16)


def pack(masks: Mapping[str, Mask]) -> Table:
    """Write masks, uint8 (size, size) of 0 and 1, by SOP Instance UID; at least one."""
    rows = []
    for uid, mask in masks.items():
        bits = np.packbits(mask).tobytes()
        row = uid.encode("ascii").ljust(_UID_BYTES, b"\0") + bits
        rows.append(np.frombuffer(row.ljust(2 * words(len(mask)), b"\0"), "<u2"))
    return np.stack(rows).astype(np.uint16)


class Outlines:
    """A table that was judged. Masks stay bits until they are asked for: a small file can name a
    thousand images that are not there.

    Args:
        table: what ``pack`` made.
        size: side of the masks.

    Raises:
        InvalidTable: it has another shape, or its UIDs are none or not distinct.
    """

    def __init__(self, table: Table, size: int) -> None:
        if table.ndim != 2 or table.shape[1] != words(size) or not len(table):
            raise InvalidTable
        self._table = table
        self._size = size
        self._rows = {_uid(row): place for place, row in enumerate(table)}
        if len(self._rows) != len(table):
            raise InvalidTable

    @property
    def uids(self) -> Collection[str]:
        """SOP Instance UIDs of the images."""
        return self._rows.keys()

    def mask(self, uid: str) -> Mask:
        """The mask of an image, uint8 (size, size) of 0 and 1."""
        raw = self._table[self._rows[uid]].astype("<u2").tobytes()
        bits = np.frombuffer(raw, np.uint8, offset=_UID_BYTES)
        return np.unpackbits(bits, count=self._size**2).reshape(self._size, self._size)


def _uid(row: NDArray[np.uint16]) -> str:
    uid = row[: _UID_BYTES // 2].astype("<u2").tobytes().rstrip(b"\0")
    if not _UID.fullmatch(uid):
        raise InvalidTable
    return uid.decode("ascii")
