"""Codes of files that are rejected one by one, which are counted and never raised."""

from __future__ import annotations

import enum


class Reject(enum.Enum):
    """Why one file was rejected; the value is its stable code.

    A reject is counted and listed for the steward at the site; it never stops an ingest.
    """

    NOT_DICOM = "CLO-210"
    TRUNCATED = "CLO-211"
    NO_PIXELS = "CLO-212"
    TRANSFER_SYNTAX = "CLO-213"
    SOP_CLASS = "CLO-214"
    MODALITY = "CLO-215"
    TOO_LARGE = "CLO-216"
    FRAMES = "CLO-217"
    COLOUR = "CLO-218"
    PREAMBLE = "CLO-219"
    PIXEL_FORMAT = "CLO-220"
    DECODE_FAILED = "CLO-221"
    NO_PATIENT = "CLO-222"
    BURNED_IN = "CLO-223"
    DUPLICATE = "CLO-224"
    UNREADABLE = "CLO-225"
    OUTSIDE_ROOT = "CLO-226"
    EXHAUSTED = "CLO-227"
    VOLUME_INCOMPLETE = "CLO-228"
    VOLUME_UNPLACED = "CLO-229"
    VOLUME_MIXED = "CLO-230"
    VOLUME_DOUBLED = "CLO-231"
    VOLUME_TILTED = "CLO-232"
    VOLUME_UNEVEN = "CLO-233"
    CAPTURE = "CLO-234"
    SEGMENT = "CLO-235"
    SEGMENTATION = "CLO-236"

    @property
    def title(self) -> str:
        return _REJECT_TITLES[self]

    @property
    def held(self) -> bool:
        """Whether the file is quarantined, until a person looks at it and may release it."""
        return self in _HELD


_HELD = frozenset((Reject.PREAMBLE, Reject.BURNED_IN, Reject.CAPTURE))

_REJECT_TITLES = {
    Reject.NOT_DICOM: "not a DICOM file",
    Reject.TRUNCATED: "truncated or damaged DICOM file",
    Reject.NO_PIXELS: "no pixel data",
    Reject.TRANSFER_SYNTAX: "transfer syntax not accepted",
    Reject.SOP_CLASS: "SOP class not accepted",
    Reject.MODALITY: "modality not asked for by the study",
    Reject.TOO_LARGE: "file or image too large",
    Reject.FRAMES: "multi-frame image",
    Reject.COLOUR: "colour image",
    Reject.PREAMBLE: "preamble is neither empty nor TIFF",
    Reject.PIXEL_FORMAT: "pixel description missing or inconsistent",
    Reject.DECODE_FAILED: "pixel data cannot be decoded",
    Reject.NO_PATIENT: "PatientID is missing",
    Reject.BURNED_IN: "text may be burned into the pixels",
    Reject.DUPLICATE: "duplicate image",
    Reject.UNREADABLE: "file cannot be opened",
    Reject.OUTSIDE_ROOT: "symbolic link out of the data folder",
    Reject.EXHAUSTED: "reading exceeded the limit of memory or time",
    Reject.VOLUME_INCOMPLETE: "slice of a series too short for a volume",
    Reject.VOLUME_UNPLACED: "slice of a series without valid position or orientation",
    Reject.VOLUME_MIXED: "slice of a series with several orientations or pixel grids",
    Reject.VOLUME_DOUBLED: "slice of a series with two slices at one position",
    Reject.VOLUME_TILTED: "slice of a series whose stack is tilted or sheared",
    Reject.VOLUME_UNEVEN: "slice of a series with uneven slice spacing",
    Reject.CAPTURE: "secondary capture or ultrasound, which may show a name",
    Reject.SEGMENT: "segmentation without the study's segment",
    Reject.SEGMENTATION: "segmentation without usable references to its images",
}
