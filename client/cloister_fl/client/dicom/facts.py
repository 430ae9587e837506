"""Facts of one image or one segmentation besides its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister_fl.client.dicom.geometry import Place

AGE_BANDS = {"0-17": 0, "18-39": 18, "40-59": 40, "60-79": 60, "80+": 80}
"""Bands of age in which people are counted, with the first year of each, rising."""


def band_of(years: int) -> str:
    """The band of an age, 0 or more."""
    return next(name for name, first in reversed(AGE_BANDS.items()) if years >= first)


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of an image besides its shades, or of a segmentation.

    Attributes:
        rows, columns: size of the image as it was stored.
        pixels: SHA-256 of the stored values and their meaning, 64 hexadecimal digits; two files
            of one image have the same.
        modality: CR, DX, MG, CT, MR or US; SEG for a segmentation.
        manufacturer, year: of the device and of the study, as far as the file tells.
        sex, age: of the patient, as far as the file tells: F, M or O, and years, "0" to "130".
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
    sex: str = field(default="", repr=False)
    age: str = field(default="", repr=False)

    @property
    def place(self) -> Place:
        """Where a slice of CT or MR lies."""
        return Place(self.series, self.frame, self.position, self.orientation, self.pixel_spacing)

    @property
    def age_band(self) -> str:
        """The one of ``AGE_BANDS`` in which the age lies; empty where the file tells none."""
        return band_of(int(self.age)) if self.age else ""

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
    "sex",
    "age",
)

SHARED = (
    *("modality", "manufacturer", "year", "issuer", "orientation", "pixel_spacing"),
    *("sex", "age"),
)
"""Texts that are the same for many images."""
