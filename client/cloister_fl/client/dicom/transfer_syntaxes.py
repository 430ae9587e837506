"""Transfer syntaxes whose files are read: one table, which everything else asks.

The walk over a file, the acceptance, the size check of codestreams, the decoders and their known
answers, what C-GET asks an archive for, the table of docs/dicom.md, the tests and the benchmark
read it; docs/guides/add-a-transfer-syntax.md says how to add a row. It imports nothing of ours, for
a file is accepted or refused before any decoder is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Transfer syntaxes with the same frame header and the same decoder.

    Attributes:
        name: of the coding.
        decoder: what decodes it, as docs/dicom.md names it.
        end: bytes that end a whole codestream, before padding; empty where it has no end marker.
    """

    name: str
    decoder: str
    end: bytes = b""


_EOI = b"\xff\xd9"  # ITU-T T.81 B.1.1.3; T.800 A.4.4 has the same bytes
_TURBO = "libjpeg-turbo (`imagecodecs`)"
_CHARLS = "CharLS (`pyjpegls`)"
_OPENJPEG = "OpenJPEG (`pylibjpeg-openjpeg`)"

UNCOMPRESSED = Family("uncompressed", "none needed")
JPEG = Family("JPEG", _TURBO, _EOI)
JPEG_LS = Family("JPEG-LS", _CHARLS, _EOI)
JPEG_2000 = Family("JPEG 2000", _OPENJPEG, _EOI)
HTJ2K = Family("HTJ2K", _OPENJPEG, _EOI)
RLE = Family("RLE", "Cloister's own")


@dataclass(frozen=True)
class TransferSyntax:
    """A transfer syntax whose files are read.

    Attributes:
        uid: as DICOM files name it (PS3.6 annex A).
        name: as docs/dicom.md names it.
        family: how its frames are read and decoded.
        known_answer: name of the encoded image with which the decoder is checked before it is
            used, one of ``known_answers.ENCODED``; empty where nothing is decoded.
        lossy: whether decoded pixels may differ from those that were encoded.
        tolerance: largest difference from the known image, in grey levels; 0 where lossless.
        depth: bits stored of the known image, 8 or 12.
        markers: of the frame headers that it may have (ITU-T T.81 table B.1, T.87 C.1.1); empty
            for a coding that has none.
    """

    uid: str
    name: str
    family: Family
    known_answer: str = ""
    lossy: bool = False
    tolerance: int = 0
    depth: int = 12
    markers: frozenset[int] = frozenset()


IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"

_BASELINE, _EXTENDED, _LOSSLESS, _LS = 0xC0, 0xC1, 0xC3, 0xF7

_ROWS = (
    TransferSyntax(IMPLICIT_LITTLE, "Implicit VR Little Endian", UNCOMPRESSED),
    TransferSyntax(EXPLICIT_LITTLE, "Explicit VR Little Endian", UNCOMPRESSED),
    TransferSyntax(
        "1.2.840.10008.1.2.4.50", "JPEG Baseline, 8 bits", JPEG, "JPEG_BASELINE",
        lossy=True, tolerance=2, depth=8, markers=frozenset((_BASELINE,)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.51", "JPEG Extended, 8 and 12 bits", JPEG, "JPEG_EXTENDED",
        lossy=True, tolerance=2, markers=frozenset((_BASELINE, _EXTENDED)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.57", "JPEG Lossless", JPEG, "JPEG_LOSSLESS",
        markers=frozenset((_LOSSLESS,)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.70", "JPEG Lossless, first-order prediction", JPEG,
        "JPEG_LOSSLESS_SV1", markers=frozenset((_LOSSLESS,)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.80", "JPEG-LS lossless", JPEG_LS, "JPEG_LS_LOSSLESS",
        markers=frozenset((_LS,)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.81", "JPEG-LS near-lossless", JPEG_LS, "JPEG_LS_NEAR",
        lossy=True, tolerance=2, markers=frozenset((_LS,)),
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.90", "JPEG 2000 lossless only", JPEG_2000, "JPEG_2000_LOSSLESS",
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.91", "JPEG 2000", JPEG_2000, "JPEG_2000",
        lossy=True, tolerance=3,
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.201", "HTJ2K lossless only", HTJ2K, "HTJ2K_LOSSLESS",
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.202", "HTJ2K lossless only, RPCL", HTJ2K, "HTJ2K_LOSSLESS",
    ),
    TransferSyntax(
        "1.2.840.10008.1.2.4.203", "HTJ2K", HTJ2K, "HTJ2K",
        lossy=True, tolerance=2,
    ),
    TransferSyntax("1.2.840.10008.1.2.5", "RLE Lossless", RLE, "RLE"),
)  # fmt: skip

TRANSFER_SYNTAXES: Mapping[str, TransferSyntax] = {row.uid: row for row in _ROWS}
"""By UID. What is not here is refused, so a new kind of file is a decision and not an accident: no
deflated data sets, which turn a megabyte into a gigabyte, and no big endian, which is retired."""

NATIVE = frozenset(uid for uid, row in TRANSFER_SYNTAXES.items() if row.family == UNCOMPRESSED)
"""UIDs of those whose pixels are not encoded."""
