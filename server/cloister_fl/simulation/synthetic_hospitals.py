"""The hospitals of the demo: how many patients each has, and how its images leave its archive.

They differ in matrix, bit depth and response curve, photometric interpretation, transfer syntax,
window, padding, folder structure, class balance, and in which shapes pass for a nodule there.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister_fl.simulation.phantom import (
    DOTS,
    EVEN_MIX,
    ONE_STRAND,
    TWO_STRANDS,
    CaseMix,
    Scanner,
)

EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_LS_LOSSLESS = "1.2.840.10008.1.2.4.80"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"
DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"
COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"


@dataclass(frozen=True, slots=True)
class Hospital:
    """One hospital: how many patients it has and how its images come out of the archive.

    Attributes:
        name: folder name, lower case.
        institution: the DICOM InstitutionName.
        manufacturer: the DICOM Manufacturer; invented.
        model: the DICOM ManufacturerModelName; invented.
        prefix: first letters of every PatientID, unique to the hospital.
        scanner: the detector.
        patients: number of patients, at least 2.
        prevalence: share of them with a nodule, in (0, 1); rounded to whole patients.
        mix: what its negative patients have instead of a nodule.
        transfer_syntax: UID in which the images are stored; always lossless.
        sop_class: UID of the storage class; the modality follows from it.
        monochrome1: whether low stored values are bright on display.
        windowed: whether the images carry WindowCenter and WindowWidth.
        padded: whether a border holds PixelPaddingValue.
        by_date: folders by date of the examination instead of by patient.
    """

    name: str
    institution: str
    manufacturer: str
    model: str
    prefix: str
    scanner: Scanner
    patients: int
    prevalence: float
    mix: CaseMix = EVEN_MIX
    transfer_syntax: str = EXPLICIT_LITTLE_ENDIAN
    sop_class: str = DIGITAL_XRAY
    monochrome1: bool = False
    windowed: bool = False
    padded: bool = False
    by_date: bool = False

    @property
    def modality(self) -> str:
        """``DX`` or ``CR``."""
        return "DX" if self.sop_class == DIGITAL_XRAY else "CR"


# No hospital sees all that is not a nodule, nor another's response curve, and none is much larger
# than the rest: what one learns alone does not carry over to the others' patients. What hospitals
# with few nodules have instead of them, hospitals with many have too: else a hospital's class
# balance would mark that kind as harmless, whatever its patients' labels say.
HOSPITALS: tuple[Hospital, ...] = (
    Hospital(
        "northgate", "Northgate General Hospital", "Aldine Imaging", "Clarus 400", "NG",
        Scanner(112, 96, 12, gain=0.80, offset=0.05, gamma=1.5, noise=0.020),
        patients=100, prevalence=0.35, mix=ONE_STRAND, windowed=True,
    ),
    Hospital(
        "riverside", "Riverside University Clinic", "Borealis Medical", "Polar DR", "RU",
        Scanner(128, 112, 14, gain=0.60, offset=0.10, gamma=0.55, noise=0.030),
        patients=95, prevalence=0.42, mix=DOTS, transfer_syntax=RLE_LOSSLESS, by_date=True,
    ),
    Hospital(
        "hillcrest", "Hillcrest Community Hospital", "Corvin X-Ray", "Plate 7", "HC",
        Scanner(96, 98, 10, gain=0.95, offset=0.0, gamma=1.6, noise=0.035),
        patients=95, prevalence=0.65, mix=TWO_STRANDS, sop_class=COMPUTED_RADIOGRAPHY,
        monochrome1=True,
    ),
    Hospital(
        "eastfield", "Eastfield Chest Centre", "Aldine Imaging", "Clarus 900", "EF",
        Scanner(144, 120, 16, gain=0.50, offset=0.20, gamma=0.7, noise=0.025),
        patients=90, prevalence=0.55, mix=DOTS, transfer_syntax=JPEG_LS_LOSSLESS,
        windowed=True, padded=True,
    ),
    Hospital(
        "lakeview", "Lakeview Regional Hospital", "Dorran Systems", "Axis CR", "LV",
        Scanner(136, 128, 12, gain=0.70, offset=0.02, gamma=1.25, noise=0.030),
        patients=90, prevalence=0.60, mix=ONE_STRAND, transfer_syntax=JPEG_2000_LOSSLESS,
        sop_class=COMPUTED_RADIOGRAPHY, by_date=True,
    ),
)  # fmt: skip
