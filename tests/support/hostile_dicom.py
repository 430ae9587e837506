"""Files that were made to hurt, each with the reasons for which it may be turned away.

``None`` among the reasons means that the file may also be read: its trap lies in what is dropped,
or a decoder makes something of it within its limits.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from support.dicom import SIZED, encode, make_dicom, radiograph, sample

GIB = 1 << 30
ENCODED = sorted(TRANSFER_SYNTAXES.keys() - NATIVE)
_SEQUENCE_END = b"\xfe\xff\xdd\xe0" + bytes(4)
_ITEM_END = b"\xfe\xff\x0d\xe0" + bytes(4)
_EMPTY_ITEM = b"\xfe\xff\x00\xe0" + bytes(4)
_OPEN_ITEM = b"\xfe\xff\x00\xe0" + b"\xff" * 4
_NO_PIXELS = {"without": ["PixelData"]}


@dataclass(frozen=True)
class Hostile:
    """A file, and how reading it may end; ``None`` is an image."""

    name: str
    data: bytes
    ends: frozenset[Reject | None]


def _one(name: str, data: bytes, *ends: Reject | None) -> Hostile:
    return Hostile(name, data, frozenset(ends))


def corpus() -> Iterator[Hostile]:
    """Yield every hostile file but the bombs; made when asked for, for some are large."""
    yield from _polyglots()
    yield from _containers()
    yield from _lying_lengths()
    yield from _headers()
    yield from _lying_codestreams()


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An element in explicit VR, with a length that may be a lie."""
    told = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in (b"SQ", b"UN", b"OB", b"OW", b"UT"):
        return head + struct.pack("<HI", 0, told) + value
    return head + struct.pack("<H", told) + value


def _archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("payload.txt", "x" * 100)
    return out.getvalue()


def _polyglots() -> Iterator[Hostile]:
    starts = {
        "MZ": b"MZ\x90\0\3",
        "ELF": b"\x7fELF\2\1\1",
        "HTML": b"<html><script>alert(1)</script>",
        "ZIP": b"PK\3\4",
        "shell": b"#!/bin/sh\nexit\n",
        "PDF": b"%PDF-1.7",
    }
    for name, start in starts.items():
        yield _one(
            f"preamble-{name}", make_dicom(preamble=start.ljust(128, b"\0")), Reject.PREAMBLE
        )
    yield _one("appended-zip", make_dicom() + _archive(), Reject.TRUNCATED)
    inside = element(0x7FE11010, b"OB", _archive() + bytes(len(_archive()) % 2))
    yield _one("zip-in-a-private-element", make_dicom() + inside, None)


def _containers() -> Iterator[Hostile]:
    sound = make_dicom()
    explicit = b"UI\x14\x001.2.840.10008.1.2.1\0"
    for name, uid in (
        ("deflated", b"1.2.840.10008.1.2.1.99"),
        ("big-endian", b"1.2.840.10008.1.2.2\0"),
    ):
        other = sound.replace(explicit, b"UI" + struct.pack("<H", len(uid)) + uid)
        if name == "deflated":
            packer = zlib.compressobj(9, wbits=-15)
            zeros = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024))
            other += zeros + packer.flush()
        yield _one(name, other, Reject.TRANSFER_SYNTAX)
    bare = make_dicom(**_NO_PIXELS)
    private = element(0x00291010, b"SQ", b"", 0xFFFFFFFF)
    yield _one(
        "million-items", bare + private + _EMPTY_ITEM * 1_000_000 + _SEQUENCE_END, Reject.TRUNCATED
    )
    items = _EMPTY_ITEM * 100_000
    yield _one("items-in-a-table", bare + element(0x00283010, b"SQ", items), Reject.TRUNCATED)
    million = b"".join(element(0x00291010 + n % 200, b"LO", b"") for n in range(250_000))
    yield _one("million-elements", bare + million, Reject.TRUNCATED)
    for depth in (101, 1_000, 50_000):
        nested = (private + _OPEN_ITEM) * depth + (_ITEM_END + _SEQUENCE_END) * depth
        yield _one(f"nested-{depth}", bare + nested, Reject.TRUNCATED)
    table = element(0x00283010, b"SQ", b"", 0xFFFFFFFF)
    nested = (table + _OPEN_ITEM) * 5_000 + (_ITEM_END + _SEQUENCE_END) * 5_000
    yield _one("nested-tables", bare + nested, Reject.TRUNCATED)
    frame = encode(radiograph(), JPEGLSLossless, 12)
    start = element(0x7FE00010, b"OB", b"", 0xFFFFFFFF)
    compressed = make_dicom(transfer_syntax=JPEGLSLossless, **_NO_PIXELS)
    fragment = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(frame) + len(frame) % 2)
    padded = frame + bytes(len(frame) % 2)
    yield _one(
        "many-fragments",
        compressed
        + start
        + _EMPTY_ITEM
        + fragment
        + padded
        + _EMPTY_ITEM * 300_000
        + _SEQUENCE_END,
        Reject.TRUNCATED,
    )
    yield _one(
        "fragment-past-the-end",
        compressed
        + start
        + _EMPTY_ITEM
        + b"\xfe\xff\x00\xe0"
        + struct.pack("<I", 3 * GIB)
        + padded,
        Reject.TRUNCATED,
    )
    yield _one("pixels-twice", sound + sound[sound.rindex(b"\xe0\x7f\x10\x00") :], Reject.TRUNCATED)
    yield _one("empty", b"", Reject.NOT_DICOM)
    yield _one("only-a-preamble", bytes(128) + b"DICM", Reject.TRUNCATED)
    for end in range(0, len(sound), max(1, len(sound) // 25)):
        yield _one(
            f"cut-at-{end}", sound[:end], Reject.NOT_DICOM, Reject.TRUNCATED, Reject.TRANSFER_SYNTAX
        )


def _lying_lengths() -> Iterator[Hostile]:
    sound, bare = make_dicom(), make_dicom(**_NO_PIXELS)
    pixels = sound[len(bare) + 12 :]
    for length in (3 * GIB, 0xFFFFFFFE, 0xFFFFFFFF, len(pixels) + 2):
        yield _one(
            f"pixels-claim-{length}",
            bare + element(0x7FE00010, b"OW", pixels, length),
            Reject.TRUNCATED,
        )
    yield _one("pixels-short", bare + element(0x7FE00010, b"OW", pixels[:100]), Reject.TRUNCATED)
    yield _one("pixels-long", bare + element(0x7FE00010, b"OW", pixels * 3), Reject.PIXEL_FORMAT)
    yield _one(
        "private-claims-4-GB",
        bare + element(0x00291010, b"OB", b"", 4_000_000_000),
        Reject.TRUNCATED,
    )
    item = b"\xfe\xff\x00\xe0" + struct.pack("<I", 2 * GIB)
    yield _one("item-past-its-sequence", bare + element(0x00283010, b"SQ", item), Reject.TRUNCATED)
    yield _one(
        "sequence-never-ends",
        bare + element(0x00291010, b"SQ", _OPEN_ITEM, 0xFFFFFFFF),
        Reject.TRUNCATED,
    )
    odd = sound.replace(b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00US\x03\x00")
    yield _one("rows-of-three-bytes", odd, Reject.TRUNCATED, Reject.PIXEL_FORMAT)


def _headers() -> Iterator[Hostile]:
    def given(name: str, value: Any, *ends: Reject | None) -> Hostile:
        return _one(f"{name}-{value!r:.20}", make_dicom(elements={name: value}), *ends)

    yield _one(
        "huge-image", make_dicom(elements={"Rows": 65535, "Columns": 65535}), Reject.TOO_LARGE
    )
    yield _one(
        "large-image-of-nothing",
        make_dicom(elements={"Rows": 8192, "Columns": 8192}),
        Reject.TRUNCATED,
    )
    yield given("NumberOfFrames", 2**31 - 1, Reject.FRAMES)
    yield given("NumberOfFrames", -1, Reject.FRAMES)
    yield given("SamplesPerPixel", 65535, Reject.COLOUR)
    yield given("BitsAllocated", 65535, Reject.PIXEL_FORMAT)
    yield given("BitsStored", 65535, Reject.PIXEL_FORMAT)
    yield given("Modality", "US", Reject.MODALITY)
    yield given("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7", Reject.CAPTURE)
    yield given("SOPInstanceUID", "../../etc/passwd", Reject.TRUNCATED)
    yield given("PatientID", "x" * 60_000, Reject.TRUNCATED)
    yield given("AccessionNumber", "\n" * 3000, None)
    # What Python knows as an encoding is more than text, and any module can bear the name.
    for charset in (b"zlib_codec", b"idna      ", b"unicode_escape", b"../../tmp/x", b"os"):
        data = make_dicom(elements={"SpecificCharacterSet": "x" * 16})
        data = data.replace(b"x" * 16, charset.ljust(16))
        yield _one(f"charset-{charset.decode()}", data, None, Reject.TRUNCATED)
    yield given("SpecificCharacterSet", ["ISO 2022 IR 87"] * 500, None, Reject.TRUNCATED)
    yield given("WindowWidth", [1] * 20_000, None, Reject.TRUNCATED, Reject.PIXEL_FORMAT)
    for number in ("1e999", "-1e308", "nan", "1" * 5000, "0x10", "1_000"):
        data = make_dicom(elements={"RescaleSlope": "2.5", "RescaleIntercept": "0"})
        wrong = number.encode() + b" " * (len(number) % 2)
        data = data.replace(element(0x00281053, b"DS", b"2.5 "), element(0x00281053, b"DS", wrong))
        yield _one(f"slope-{number:.8}", data, None, Reject.TRUNCATED, Reject.PIXEL_FORMAT)
    sound = make_dicom()
    for vr in (b"SQ", b"LO", b"DS", b"UI", b"FD", b"ZZ", b"OB", b"US", b"AT", b"PN"):
        for tag, name in (
            (b"\x28\0\x10\0", "rows"),
            (b"\x10\0\x20\0", "patient"),
            (b"\x08\0\x18\0", "uid"),
        ):
            at = sound.index(tag) + 4
            data = sound[:at] + vr + sound[at + 2 :]
            rejects = (Reject.TRUNCATED, Reject.PIXEL_FORMAT, Reject.NO_PATIENT, Reject.TOO_LARGE)
            yield _one(f"{name}-as-{vr.decode()}", data, None, *rejects)
    for first, count, entries in ((0, 0, 4), (0, 65535, 1), (40_000, 4, 4)):
        item = Dataset()
        item.LUTDescriptor = [count, first, 16]
        item["LUTDescriptor"].VR = "US"
        item.LUTData = list(range(entries))
        item["LUTData"].VR = "US"
        data = make_dicom(elements={"VOILUTSequence": Sequence([item])})
        yield _one(f"table-{count}-of-{entries}", data, None, Reject.PIXEL_FORMAT, Reject.TRUNCATED)


def _sound(transfer_syntax: str) -> tuple[np.ndarray[Any, Any], int]:
    return sample(transfer_syntax, rows=64, columns=64)


def _resized(frame: bytes, transfer_syntax: str, rows: int, columns: int) -> bytes:
    """The same codestream, which says that it has another size."""
    wrong = bytearray(frame)
    if frame.startswith(b"\xff\x4f"):
        wrong[8:16] = struct.pack(">II", columns, rows)
        # One tile, as before.
        wrong[24:32] = struct.pack(">II", columns, rows)
        return bytes(wrong)
    for marker in (0xC0, 0xC1, 0xC3, 0xF7):
        at = frame.find(bytes([0xFF, marker, 0, 11]))
        if at >= 0:
            wrong[at + 5 : at + 9] = struct.pack(">HH", rows, columns)
    return bytes(wrong)


def _lying_codestreams() -> Iterator[Hostile]:
    for syntax in ENCODED:
        pixels, bits = _sound(syntax)
        frame = encode(pixels, syntax, bits)
        options: dict[str, Any] = {"bits_stored": bits, "transfer_syntax": syntax}
        if syntax in SIZED:
            lying = _resized(frame, syntax, 60_000, 60_000)
            assert lying != frame
            yield _one(
                f"codestream-of-60000-{syntax}",
                make_dicom(pixels, encoded=lying, **options),
                Reject.PIXEL_FORMAT,
            )
        for part in (4, 40, len(frame) // 2, len(frame) - 3):
            cut = make_dicom(pixels, encoded=frame[:part], **options)
            ends = (Reject.TRUNCATED, Reject.DECODE_FAILED, Reject.PIXEL_FORMAT, Reject.COLOUR)
            yield _one(f"codestream-cut-{part}-{syntax}", cut, *ends)
        other = encode(_sound(HTJ2KLossless)[0], HTJ2KLossless, 12)
        if syntax in (RLELossless, JPEGLossless, JPEGLSLossless):
            swapped = make_dicom(pixels, encoded=other, **options)
            yield _one(
                f"codestream-swapped-{syntax}", swapped, Reject.DECODE_FAILED, Reject.PIXEL_FORMAT
            )
    offsets = struct.pack("<16I", 2, 64, 0xFFFFFFF0, *([0] * 13)) + bytes(100)
    yield _one(
        "rle-offset-past-the-end",
        make_dicom(encoded=offsets, transfer_syntax=RLELossless),
        Reject.DECODE_FAILED,
    )
    many = struct.pack("<16I", 0xFFFFFFFF, *([64] * 15)) + bytes(100)
    yield _one(
        "rle-of-4-billion-segments",
        make_dicom(encoded=many, transfer_syntax=RLELossless),
        Reject.PIXEL_FORMAT,
    )


def bombs() -> Iterator[Hostile]:
    """Small files whose images fill the pixel budget, in every coding."""
    ends = (None, Reject.DECODE_FAILED, Reject.EXHAUSTED)
    for syntax in SIZED:
        pixels, bits = _sound(syntax)
        frame = _resized(encode(pixels, syntax, bits), syntax, 8192, 8192)
        large: dict[str, Any] = {"Rows": 8192, "Columns": 8192}
        data = make_dicom(
            pixels, bits_stored=bits, transfer_syntax=syntax, encoded=frame, elements=large
        )
        yield _one(f"bomb-{syntax}", data, *ends)
    plane = bytes([129, 0]) * (8192 * 8192 // 128)
    rle = struct.pack("<16I", 2, 64, 64 + len(plane), *([0] * 13)) + plane * 2
    large = {"Rows": 8192, "Columns": 8192}
    yield _one(
        "bomb-rle", make_dicom(transfer_syntax=RLELossless, encoded=rle, elements=large), *ends
    )
    flat = np.zeros((8192, 8192), np.uint16)
    yield _one(
        "bomb-flat",
        make_dicom(flat, bits_stored=12, transfer_syntax=JPEGLSLossless),
        None,
        Reject.EXHAUSTED,
    )
    yield precinct_bomb()


def precinct_bomb() -> Hostile:
    """153 bytes of JPEG 2000 that ask for far more than 2 GB.

    A precinct is a few hundred bytes of the decoder's own; here each has two by two pixels of an
    8192 x 8192 image (T.800 A.6.1, precinct sizes; B.6).
    """
    siz = struct.pack(">HHIIIIIIIIHBBB", 41, 0, 8192, 8192, 0, 0, 8192, 8192, 0, 0, 1, 11, 1, 1)
    # Five levels, code blocks of 4 x 4, precincts of 2 x 2 pixels at every level.
    cod = struct.pack(">HBBHBBBBBB", 18, 1, 0, 1, 0, 5, 0, 0, 0, 1) + b"\x11" * 6
    qcd = struct.pack(">HB", 19, 0x40) + bytes([0x60] * 16)
    tile = struct.pack(">HHIBB", 10, 0, 0, 0, 1)
    frame = b"\xff\x4f\xff\x51" + siz + b"\xff\x52" + cod + b"\xff\x5c" + qcd
    frame += b"\xff\x90" + tile + b"\xff\x93" + bytes(8) + b"\xff\xd9"
    data = make_dicom(
        transfer_syntax=JPEG2000Lossless,
        encoded=frame,
        elements={"Rows": 8192, "Columns": 8192},
    )
    return _one("precincts", data, Reject.EXHAUSTED, Reject.DECODE_FAILED)
