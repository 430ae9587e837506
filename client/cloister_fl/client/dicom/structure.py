"""DICOM structure parser: a bounded walk over a file's bytes (PS3.5 section 7, PS3.10 section 7).

Parsers for DICOM accept almost anything: files cut short, lengths past the end, items nested
until the stack overflows. This walk reads element headers alone, checks every length against its
container, counts what it meets, and cuts out the few elements that are wanted. Only those bytes
ever reach a library, so no library can quote what it has not seen.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import IMPLICIT_LITTLE, NATIVE
from cloister_fl.errors import Reject

PREAMBLE_BYTES = 128
MAX_DEPTH = 100
"""Deepest nesting of items."""
MAX_ELEMENTS = 200_000
"""Most elements, items and fragments in a file."""
MAX_PARSED_ELEMENTS = 1000
"""Most elements and items in one sequence that a library is going to parse; a table has three."""
MAX_KEPT_BYTES = 1 << 20
"""Longest value of a wanted element other than the pixels; a 16-bit LUT needs 128 KiB."""

PIXEL_DATA = 0x7FE00010
_TRANSFER_SYNTAX = 0x00020010
_ITEM = 0xFFFEE000
_SEQUENCE_END = 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF

# PS3.5 section 7.1.2: these have two reserved bytes and a length of four.
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR"))
_LONG |= {b"UT", b"UV"}
_SHORT = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN")
)
_SHORT |= {b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}


@dataclass(frozen=True)
class Parts:
    """What the walk cuts out of a file.

    Attributes:
        transfer_syntax: its UID.
        implicit: whether ``header`` is encoded with implicit VR.
        header: the wanted elements as a data set of its own, little endian.
        pixels: native pixel bytes, or the fragments of the encapsulated frame joined; None where
            the file has no Pixel Data element.
        aside: values of elements that no library is to see, by tag.
    """

    transfer_syntax: str
    implicit: bool
    header: bytes
    pixels: bytes | None
    aside: Mapping[int, bytes]

    def __repr__(self) -> str:
        return f"Parts(transfer_syntax={self.transfer_syntax!r})"


@dataclass(frozen=True, slots=True)
class _Element:
    tag: int
    vr: bytes
    start: int  # of the header
    value: int  # of the value
    length: int


def dissect(
    data: bytes,
    wanted: Set[int],
    accepted: Set[str],
    aside: Set[int] = frozenset(),
    *,
    most_parsed: int = MAX_PARSED_ELEMENTS,
) -> Parts:
    """Walk a whole file and cut out the elements in ``wanted``.

    Args:
        data: the file, which starts with a preamble and ``DICM``.
        wanted: tags to keep, as ``0xGGGGEEEE``.
        accepted: UIDs of the transfer syntaxes that may be walked.
        aside: tags whose values are kept apart, none of them a sequence.
        most_parsed: most elements and items in one sequence that is kept.

    Raises:
        RejectedFile: ``NOT_DICOM``, ``TRANSFER_SYNTAX``, or ``TRUNCATED`` for every structure
            that does not add up.
    """
    if len(data) < PREAMBLE_BYTES + 4 or data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] != b"DICM":
        raise RejectedFile(Reject.NOT_DICOM)
    walk = _Walk(data)
    syntax, start = walk.meta(PREAMBLE_BYTES + 4)
    if syntax not in accepted:
        raise RejectedFile(Reject.TRANSFER_SYNTAX)
    implicit = syntax == IMPLICIT_LITTLE
    native = syntax in NATIVE
    kept: dict[int, bytes] = {}
    values: dict[int, bytes] = {}
    pixels: bytes | None = None
    for element, end in walk.top_level(start, implicit):
        if element.tag == PIXEL_DATA:
            if pixels is not None or native == (element.length == _UNDEFINED):
                raise _damaged()
            pixels = (
                data[element.value : end] if native else b"".join(walk.fragments(element.value))
            )
        elif element.tag in wanted:
            if element.tag in kept or end - element.start > MAX_KEPT_BYTES:
                raise _damaged()
            walk.descend(element, implicit, most_parsed)
            kept[element.tag] = data[element.start : end]
        elif element.tag in aside:
            if element.tag in values or element.length > MAX_KEPT_BYTES:
                raise _damaged()
            values[element.tag] = data[element.value : end]
    header = b"".join(kept[tag] for tag in sorted(kept))
    return Parts(syntax, implicit, header, pixels, values)


def _damaged() -> RejectedFile:
    return RejectedFile(Reject.TRUNCATED)


class _Walk:
    """Position-free reader with one budget of elements for the whole file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._seen = 0

    def meta(self, at: int) -> tuple[str, int]:
        """Read the file meta information; return the transfer syntax and where it ends."""
        syntax: str | None = None
        while self._data[at : at + 2] == b"\x02\x00":
            element = self._element(at, len(self._data), implicit=False)
            at = self._end(element, len(self._data))
            if element.tag == _TRANSFER_SYNTAX:
                if syntax is not None or element.length > 64:
                    raise _damaged()
                value = self._data[element.value : at]
                syntax = value.decode("ascii", "replace").strip("\0 ")
        if syntax is None:
            raise _damaged()
        return syntax, at

    def top_level(self, at: int, implicit: bool) -> Iterator[tuple[_Element, int]]:
        """Yield each element of the data set with the offset of its end."""
        limit = len(self._data)
        while at < limit:
            # Some archives pad files to a block; anything but zeros there is not part of it.
            if self._data[at : at + 4] == bytes(4) or limit - at < 8:
                if self._data.count(0, at) != limit - at:
                    raise _damaged()
                return
            element = self._element(at, limit, implicit)
            end = self._after(element, limit, implicit, 0)
            yield element, end
            at = end

    def descend(self, element: _Element, implicit: bool, most: int) -> None:
        """Check the inside of a sequence that a library is going to parse."""
        if element.vr == b"SQ" or (implicit and self._starts_item(element)):
            before = self._seen
            self._sequence(element, len(self._data), implicit, 0, inside=True)
            if self._seen - before > most:
                raise _damaged()

    def fragments(self, at: int) -> Iterator[bytes]:
        """Yield the fragments of encapsulated pixel data, without the offset table (A.4)."""
        first = True
        while True:
            tag, length = self._item(at, len(self._data))
            at += 8
            if tag == _SEQUENCE_END:
                return
            if not first:
                yield self._data[at : at + length]
            first = False
            at += length

    def _starts_item(self, element: _Element) -> bool:
        return self._data[element.value : element.value + 4] == b"\xfe\xff\x00\xe0"

    def _count(self) -> None:
        self._seen += 1
        if self._seen > MAX_ELEMENTS:
            raise _damaged()

    def _element(self, at: int, limit: int, implicit: bool) -> _Element:
        self._count()
        if limit - at < 8:
            raise _damaged()
        group, number = struct.unpack_from("<HH", self._data, at)
        tag = group << 16 | number
        if group == 0xFFFE:
            raise _damaged()
        if implicit:
            return _Element(tag, b"", at, at + 8, self._long(at + 4))
        vr = self._data[at + 4 : at + 6]
        if vr in _SHORT:
            (length,) = struct.unpack_from("<H", self._data, at + 6)
            return _Element(tag, vr, at, at + 8, length)
        if vr not in _LONG or limit - at < 12:
            raise _damaged()
        return _Element(tag, vr, at, at + 12, self._long(at + 8))

    def _long(self, at: int) -> int:
        (length,) = struct.unpack_from("<I", self._data, at)
        return int(length)

    def _end(self, element: _Element, limit: int) -> int:
        end = element.value + element.length
        if element.length == _UNDEFINED or end > limit:
            raise _damaged()
        return end

    def _after(self, element: _Element, limit: int, implicit: bool, depth: int) -> int:
        """Return where an element ends; its inside is looked at only if its length is not told."""
        if element.length != _UNDEFINED:
            return self._end(element, limit)
        if element.tag == PIXEL_DATA and depth == 0:
            return self._encapsulated(element.value, limit)
        # PS3.5 section 6.2.2: UN of undefined length holds a sequence in implicit VR.
        inner = implicit or element.vr == b"UN"
        if not inner and element.vr != b"SQ":
            raise _damaged()
        return self._sequence(element, limit, inner, depth, inside=False)

    def _encapsulated(self, at: int, limit: int) -> int:
        while True:
            tag, length = self._item(at, limit)
            at += 8 + length
            if tag == _SEQUENCE_END:
                return at

    def _item(self, at: int, limit: int) -> tuple[int, int]:
        """Read an item header whose length must be told, or a sequence's end."""
        self._count()
        if limit - at < 8:
            raise _damaged()
        group, number, length = struct.unpack_from("<HHI", self._data, at)
        tag = group << 16 | number
        if tag not in (_ITEM, _SEQUENCE_END) or at + 8 + length > limit:
            raise _damaged()
        if tag == _SEQUENCE_END and length:
            raise _damaged()
        return tag, length

    def _sequence(
        self, element: _Element, limit: int, implicit: bool, depth: int, *, inside: bool
    ) -> int:
        """Walk the items of a sequence; return where it ends.

        With ``inside`` every item is walked, else only those whose length is not told.
        """
        if depth >= MAX_DEPTH:
            raise _damaged()
        at = element.value
        told = element.length != _UNDEFINED
        if told:
            limit = self._end(element, limit)
        while not (told and at == limit):
            self._count()
            if limit - at < 8:
                raise _damaged()
            group, number, length = struct.unpack_from("<HHI", self._data, at)
            tag = group << 16 | number
            at += 8
            if tag == _SEQUENCE_END and not told:
                return at
            if tag != _ITEM:
                raise _damaged()
            at = self._inside_item(at, length, limit, implicit, depth + 1, inside=inside)
        return at

    def _inside_item(
        self, at: int, length: int, limit: int, implicit: bool, depth: int, *, inside: bool
    ) -> int:
        told = length != _UNDEFINED
        if told:
            if at + length > limit:
                raise _damaged()
            limit = at + length
            if not inside:
                return limit
        while not (told and at == limit):
            if not told and self._data[at : at + 8] == b"\xfe\xff\x0d\xe0\0\0\0\0":
                return at + 8
            element = self._element(at, limit, implicit)
            if inside and (element.vr == b"SQ" or (implicit and self._starts_item(element))):
                at = self._sequence(element, limit, implicit, depth, inside=True)
            else:
                at = self._after(element, limit, implicit, depth)
        return at
