"""Acceptance checks of a file before a decoder sees its pixels; cheap checks first.

Closed lists only: a transfer syntax, SOP class or pixel description that is not named here is
refused, so a new kind of file is a decision and not an accident.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from cloister_fl.client.dicom import structure
from cloister_fl.client.dicom.codestream import check_codestream
from cloister_fl.client.dicom.header import ASIDE, WANTED, PixelLayout, Tags, parse_tags, person
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_PIXELS
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from cloister_fl.system.text import is_blank

_RADIOGRAPHS = frozenset(("CR", "DX", "MG"))
SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1": _RADIOGRAPHS,  # Computed Radiography
    "1.2.840.10008.5.1.4.1.1.1.1": _RADIOGRAPHS,  # Digital X-Ray, for presentation
    "1.2.840.10008.5.1.4.1.1.1.1.1": _RADIOGRAPHS,  # Digital X-Ray, for processing
    "1.2.840.10008.5.1.4.1.1.1.2": _RADIOGRAPHS,  # Digital Mammography, for presentation
    "1.2.840.10008.5.1.4.1.1.1.2.1": _RADIOGRAPHS,  # Digital Mammography, for processing
    "1.2.840.10008.5.1.4.1.1.2": frozenset(("CT",)),
    "1.2.840.10008.5.1.4.1.1.4": frozenset(("MR",)),
    "1.2.840.10008.5.1.4.1.1.6.1": frozenset(("US",)),
    "1.2.840.10008.5.1.4.1.1.7": _RADIOGRAPHS | {"CT", "MR", "US"},  # Secondary Capture
}
"""The SOP classes that are read, each with the modalities that it may carry."""

CAPTURES = frozenset(("1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.7"))
"""Ultrasound and secondary captures: names are drawn into the pixels as often as not, whatever
Burned In Annotation says."""

_NO_ANNOTATION_EXPECTED = frozenset(("CR", "DX", "CT", "MR"))
_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9.1
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, eq=False)
class Checked:
    """A file that may be decoded.

    Attributes:
        tags: the allow-listed elements.
        person: see ``header.person``.
        transfer_syntax: its UID, one of ``transfer_syntaxes.TRANSFER_SYNTAXES``.
        pixels: native bytes or one encoded frame.
    """

    tags: Tags
    person: str
    transfer_syntax: str
    pixels: bytes

    def __repr__(self) -> str:
        return f"Checked(tags={self.tags!r})"


def precheck(data: bytes, modalities: Collection[str], *, released: bool = False) -> Checked:
    """Judge a file's bytes.

    Args:
        data: the whole file.
        modalities: the modalities that the study reads.
        released: whether a person has looked at it, so that it need not be held (``Reject.held``).

    Raises:
        RejectedFile: with the first reason that applies; of those for which a file is held, with
            one that says that it may show a name.
    """
    try:
        judge_preamble(data, released=released)
    except RejectedFile as held:
        if held.reason is Reject.PREAMBLE:
            _worse(data, modalities)
        raise
    return _judged(data, modalities, released=released)


def _worse(data: bytes, modalities: Collection[str]) -> None:
    """Raise what a person must know of a file that is held for its preamble: that it may show a
    name, for a release is of the whole file."""
    try:
        _judged(data, modalities, released=False)
    except RejectedFile as rejected:
        if rejected.reason.held:
            raise


def _judged(data: bytes, modalities: Collection[str], *, released: bool) -> Checked:
    parts = structure.dissect(data, WANTED, TRANSFER_SYNTAXES.keys(), ASIDE)
    if parts.pixels is None:
        # Before the header is read: reports and plans have no pixel description to be wrong.
        raise RejectedFile(Reject.NO_PIXELS)
    tags = parse_tags(parts.header, parts.implicit)
    if tags.sop_class not in SOP_CLASSES:
        raise RejectedFile(Reject.SOP_CLASS)
    if tags.modality not in modalities or tags.modality not in SOP_CLASSES[tags.sop_class]:
        raise RejectedFile(Reject.MODALITY)
    if is_blank(tags.patient_id):
        raise RejectedFile(Reject.NO_PATIENT)
    if not _UID.fullmatch(tags.sop_instance):
        raise RejectedFile(Reject.TRUNCATED)
    if not released:
        _annotation(tags)
    _format(tags)
    if parts.transfer_syntax in NATIVE:
        _native_length(tags.layout, len(parts.pixels))
    else:
        check_codestream(parts.pixels, parts.transfer_syntax, tags.layout)
    return Checked(tags, person(parts.aside), parts.transfer_syntax, parts.pixels)


def judge_preamble(data: bytes, *, released: bool) -> None:
    """Refuse what is no DICOM file, and hold what might be another kind of file besides.

    Raises:
        RejectedFile: ``NOT_DICOM`` or ``PREAMBLE``.
    """
    end = structure.PREAMBLE_BYTES
    if data[end : end + 4] != b"DICM":
        raise RejectedFile(Reject.NOT_DICOM)
    # A file that is also a TIFF is legitimate (PS3.10 7.1); one that is also a program is not.
    # The preamble is never copied on, so that a person may let a file with a stray byte pass.
    if not released and data.count(0, 0, end) != end and not data.startswith(_TIFF):
        raise RejectedFile(Reject.PREAMBLE)


def _annotation(tags: Tags) -> None:
    """Hold back what may show a name: all that say so, and all but CR, DX, CT and MR unless they
    deny it; captures of a screen whatever they say.
    """
    if tags.sop_class in CAPTURES:
        raise RejectedFile(Reject.CAPTURE)
    expected = tags.modality in _NO_ANNOTATION_EXPECTED
    if tags.burned_in == "YES" or (tags.burned_in != "NO" and not expected):
        raise RejectedFile(Reject.BURNED_IN)


def _format(tags: Tags) -> None:
    layout = tags.layout
    if tags.frames != 1:
        raise RejectedFile(Reject.FRAMES)
    if tags.samples != 1 or tags.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise RejectedFile(Reject.COLOUR)
    if layout.rows < 1 or layout.columns < 1:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    if layout.rows * layout.columns > MAX_PIXELS:
        raise RejectedFile(Reject.TOO_LARGE)
    sound = (
        layout.bits_allocated in (8, 16)
        and 1 <= layout.bits_stored <= layout.bits_allocated
        and layout.high_bit == layout.bits_stored - 1
    )
    if not sound:
        raise RejectedFile(Reject.PIXEL_FORMAT)


def _native_length(layout: PixelLayout, length: int) -> None:
    expected = layout.rows * layout.columns * layout.bits_allocated // 8
    if length < expected:
        raise RejectedFile(Reject.TRUNCATED)
    if length > expected + expected % 2:
        raise RejectedFile(Reject.PIXEL_FORMAT)
