"""One image of a synthetic hospital as a DICOM file: its header and its stored values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cloister_fl.simulation.phantom import Pixels
from cloister_fl.simulation.synthetic_hospitals import EXPLICIT_LITTLE_ENDIAN, Hospital

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PADDING_WIDTH = 3


def stored_values(pixels: Pixels, hospital: Hospital) -> Pixels:
    """The values that go to disk: inverted and padded as the hospital does, same shape."""
    highest = (1 << hospital.scanner.bits_stored) - 1
    stored = (highest - pixels).astype(np.uint16) if hospital.monochrome1 else pixels.copy()
    if hospital.padded:
        for edge in (np.s_[:_PADDING_WIDTH], np.s_[-_PADDING_WIDTH:]):
            stored[edge, :] = 0
            stored[:, edge] = 0
    return stored


def dataset(hospital: Hospital, header: dict[str, str], stored: Pixels, number: int) -> Dataset:
    """An image as its hospital's archive hands it over.

    Args:
        hospital: whose image it is.
        header: see ``patient_header``.
        stored: its stored values, (rows, columns); see ``stored_values``.
        number: its number among the patient's images, from 1.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    patient_id = header["PatientID"]
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    data.SOPClassUID = hospital.sop_class
    data.SOPInstanceUID = derived_uid(hospital.name, patient_id, str(number))
    data.StudyInstanceUID = derived_uid(hospital.name, patient_id, "study")
    data.SeriesInstanceUID = derived_uid(hospital.name, patient_id, "series")
    for keyword, value in header.items():
        setattr(data, keyword, value)
    data.Modality = hospital.modality
    data.Manufacturer = hospital.manufacturer
    data.ManufacturerModelName = hospital.model
    data.InstitutionName = hospital.institution
    data.BodyPartExamined = "CHEST"
    data.ViewPosition = "PA"
    data.BurnedInAnnotation = "NO"
    data.PatientOrientation = ["L", "F"]
    data.SeriesNumber = 1
    data.InstanceNumber = number
    if hospital.modality == "DX":
        data.PresentationIntentType = "FOR PRESENTATION"
        data.PixelIntensityRelationship = "LOG"
        data.PixelIntensityRelationshipSign = 1 if hospital.monochrome1 else -1
        data.PresentationLUTShape = "INVERSE" if hospital.monochrome1 else "IDENTITY"
        data.RescaleIntercept = 0
        data.RescaleSlope = 1
        data.RescaleType = "US"
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if hospital.monochrome1 else "MONOCHROME2"
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated = 16
    data.BitsStored = hospital.scanner.bits_stored
    data.HighBit = hospital.scanner.bits_stored - 1
    data.PixelRepresentation = 0
    if hospital.padded:
        data.PixelPaddingValue = 0
    if hospital.windowed:
        seen = stored[stored > 0] if hospital.padded else stored
        low, high = np.percentile(seen, (1.0, 99.0))
        data.WindowCenter = round(float(low + high) / 2.0)
        data.WindowWidth = max(2, round(float(high - low)))
    data.PixelData = stored.astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    if hospital.transfer_syntax != EXPLICIT_LITTLE_ENDIAN:
        data.compress(hospital.transfer_syntax, generate_instance_uid=False)
    return data


def patient_header(rng: np.random.Generator, hospital: Hospital, patient_id: str) -> dict[str, str]:
    """The elements that all images of a patient share; nobody's, and free of the finding."""
    family = ("Archer", "Brook", "Carver", "Dale", "Ellery", "Fenn", "Garnet", "Hale")
    given = ("Alex", "Billie", "Charlie", "Devon", "Emery", "Frankie", "Jamie", "Robin")
    day = np.datetime64("2019-01-01") + int(rng.integers(0, 1500))
    age = int(rng.integers(25, 85))
    date = str(day).replace("-", "")
    return {
        # The third part, so that no two share a name and a birth date as one person would.
        "PatientName": f"{rng.choice(family)}^{rng.choice(given)}^{patient_id}",
        "PatientID": patient_id,
        "PatientBirthDate": f"{int(date[:4]) - age}0101",
        "PatientSex": str(rng.choice(("F", "M", "O"))),
        "StudyDate": date,
        "StudyTime": f"{int(rng.integers(7, 19)):02d}{int(rng.integers(0, 60)):02d}00",
        "AccessionNumber": f"A{hospital.prefix}{int(rng.integers(10**8)):08d}",
        "StudyID": patient_id,
        "ReferringPhysicianName": "",
    }


def derived_uid(*parts: str) -> str:
    """A UID that follows from its parts, so that the same seed writes the same file."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=["cloister phantom", *parts]))
