"""Outlines on their way from a worker: a table with a row an image, its UID and its mask in bits.

A DICOM Segmentation marks pixels of other images, of one or of a whole series, so what is read of
it is a mask for each of them. The table is as a worker writes it and as the cache keeps it; this
is the one place that knows its form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

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


def unpack(table: Table, size: int) -> dict[str, Mask]:
    """Read a table of masks of side ``size``.

    Raises:
        InvalidTable: it has another shape, or its UIDs are none or not distinct.
    """
    if table.ndim != 2 or table.shape[1] != words(size) or not len(table):
        raise InvalidTable
    masks = dict(_rows(table, size))
    if len(masks) != len(table):
        raise InvalidTable
    return masks


def _rows(table: Table, size: int) -> Iterator[tuple[str, Mask]]:
    for row in table:
        raw = row.astype("<u2").tobytes()
        uid = raw[:_UID_BYTES].rstrip(b"\0")
        if not _UID.fullmatch(uid):
            raise InvalidTable
        bits = np.frombuffer(raw, np.uint8, offset=_UID_BYTES)
        yield uid.decode("ascii"), np.unpackbits(bits, count=size * size).reshape(size, size)
