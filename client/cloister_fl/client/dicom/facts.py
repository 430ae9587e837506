"""Facts of one image or one segmentation besides its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister_fl.client.dicom.geometry import Place


@dataclass(frozen=True)
class Facts:
    """All that is known of an image besides its shades, or of a segmentation.

    Attributes:
        rows, columns: size of the image as it was stored.
        pixels: SHA-256 of the stored values and their meaning, 64 hexadecimal digits; two files
            of one image have the same.
        modality: CR, DX, MG, CT, MR or US; SEG for a segmentation.
        manufacturer, year: of the device and of the study, as far as the file tells.
        sop_instance, accession, patient_id, issuer, study_instance: what it can be linked by; not
            in ``repr``. The last is empty for a segmentation, and where it is no UID.
        person: see ``header.person``.
        series, frame, position, orientation, pixel_spacing: see ``geometry.Place``.
    """

    rows: int
    columns: int
    pixels: str = field(repr=False)
    modality: str
    manufacturer: str
    year: str
    sop_instance: str = field(repr=False)
    accession: str = field(repr=False)
    patient_id: str = field(repr=False)
    issuer: str = field(repr=False)
    person: str = field(repr=False)
    series: str = field(default="", repr=False)
    frame: str = field(default="", repr=False)
    position: str = field(default="", repr=False)
    orientation: str = field(default="", repr=False)
    pixel_spacing: str = field(default="", repr=False)
    study_instance: str = field(default="", repr=False)

    @property
    def place(self) -> Place:
        """Where a slice of CT or MR lies."""
        return Place(self.series, self.frame, self.position, self.orientation, self.pixel_spacing)

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields that are texts, in the order in which they travel."""
        return tuple(getattr(self, name) for name in TEXTS)


TEXTS = (
    "modality",
    "manufacturer",
    "year",
    "sop_instance",
    "accession",
    "patient_id",
    "issuer",
    "person",
    "series",
    "frame",
    "position",
    "orientation",
    "pixel_spacing",
    "study_instance",
)
