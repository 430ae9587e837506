"""Unambiguous bytes: length-prefixed fields under a label, and a reader that accepts nothing else.

Whatever is hashed or signed in Cloister is framed here first. A frame is a sequence of fields,
each an eight-byte big-endian length and that many bytes, so two different sequences never give
the same bytes; and the first field is always a label, so a hash or signature made for one
purpose means nothing for another.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Sequence

from blake3 import blake3

Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct(">Q")
_U32 = struct.Struct(">I")
_F64 = struct.Struct(">d")


class FrameError(ValueError):
    """Bytes that are not a frame; the caller turns it into a numbered error."""


def frame(*fields: Buffer) -> bytes:
    """Join fields, each behind its length in eight bytes."""
    pieces: list[Buffer] = []
    for field in fields:
        pieces.append(_LENGTH.pack(len(field)))
        pieces.append(field)
    return b"".join(pieces)


def frame_pieces(*fields: Buffer | list[Buffer]) -> list[Buffer]:
    """What ``frame`` joins, before it is joined; a field may be in pieces itself.

    So a vector is copied once, however many frames are around it.
    """
    pieces: list[Buffer] = []
    for field in fields:
        parts = field if isinstance(field, list) else [field]
        pieces.append(_LENGTH.pack(sum(map(len, parts))))
        pieces += parts
    return pieces


def listed(items: Iterable[Buffer]) -> bytes:
    """One field out of many: their count in four bytes, then their frame."""
    held = tuple(items)
    return b"".join((_U32.pack(len(held)), *frame_pieces(*held)))


def names(sites: Iterable[str]) -> bytes:
    """One field out of site ids, in the order given."""
    return listed(site.encode() for site in sites)


def u32(value: int) -> bytes:
    """Four bytes, big-endian; ``struct.error`` outside 0 to 2**32 - 1."""
    return _U32.pack(value)


def u64(value: int) -> bytes:
    """Eight bytes, big-endian; ``struct.error`` outside 0 to 2**64 - 1."""
    return _LENGTH.pack(value)


def f64(value: float) -> bytes:
    """IEEE 754 binary64, big-endian."""
    return _F64.pack(value)


def digest(label: str, *fields: Buffer) -> bytes:
    """SHA-256 of the frame of a label and fields; 32 bytes. Large fields are not copied."""
    state = hashlib.sha256()
    for field in (label.encode(), *fields):
        state.update(_LENGTH.pack(len(field)))
        state.update(field)
    return state.digest()


def bulk_digest(label: str, data: Buffer) -> bytes:
    """BLAKE3 of the frame of a label and ``data``, on one core; 32 bytes. Nothing is copied.

    For a vector or a model, where SHA-256 takes twice the time: both resist collisions to
    128 bits, which is all that binding needs.
    """
    state = blake3()
    for field in (label.encode(), data):
        state.update(_LENGTH.pack(len(field)))
        state.update(field)
    return state.digest()


class Reader:
    """Takes a frame apart, field by field, and refuses whatever ``frame`` would not have written.

    Every method raises ``FrameError`` when the bytes end early or do not fit the asked type.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self._at = 0

    def field(self, size: int | None = None) -> bytes:
        """The next field; of exactly ``size`` bytes where a size is given."""
        return bytes(self.view(size))

    def view(self, size: int | None = None) -> memoryview:
        """The next field without a copy."""
        (length,) = _LENGTH.unpack(self._take(8))
        if size is not None and length != size:
            raise FrameError("a field has another length than agreed")
        return self._take(length)

    def _take(self, count: int) -> memoryview:
        end = self._at + count
        if end > len(self._data):
            raise FrameError("the bytes end early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def u32(self) -> int:
        """A four-byte field."""
        return int(_U32.unpack(self.view(4))[0])

    def u64(self) -> int:
        """An eight-byte field."""
        return int(_LENGTH.unpack(self.view(8))[0])

    def f64(self) -> float:
        """A float field."""
        return float(_F64.unpack(self.view(8))[0])

    def text(self) -> str:
        """A field of UTF-8."""
        try:
            return self.field().decode()
        except UnicodeDecodeError:
            raise FrameError("a name is not UTF-8") from None

    def items(self, limit: int) -> list[Reader]:
        """The fields of one ``listed`` field, each behind a reader of its own."""
        inner = Reader(self.view())
        (count,) = _U32.unpack(inner._take(4))
        if count > limit:
            raise FrameError("a list is longer than agreed")
        views = [inner.view() for _ in range(count)]
        inner.end()
        return [Reader(view) for view in views]

    def names(self, limit: int) -> tuple[str, ...]:
        """Site ids written by ``names``."""
        return tuple(item.rest_text() for item in self.items(limit))

    def rest(self) -> bytes:
        """All bytes that are left, without a length."""
        return bytes(self._take(len(self._data) - self._at))

    def rest_text(self) -> str:
        """All bytes that are left, as UTF-8."""
        try:
            return self.rest().decode()
        except UnicodeDecodeError:
            raise FrameError("a name is not UTF-8") from None

    def end(self) -> None:
        """Refuse trailing bytes."""
        if self._at != len(self._data):
            raise FrameError("bytes follow the end")


def is_sorted_set(sites: Sequence[str]) -> bool:
    """True where ids rise strictly: sorted, no id twice."""
    return all(left < right for left, right in itertools.pairwise(sites))
