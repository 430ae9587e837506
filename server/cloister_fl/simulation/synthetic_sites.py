"""Five hospitals and a hold-out, written as the DICOM folders that real ones would hand over.

The images come from :mod:`cloister_fl.simulation.phantom`. What this module adds is what makes
hospitals differ: matrix, bit depth and response curve, photometric interpretation, transfer
syntax, window, padding, folder structure, class balance, which shapes pass for a nodule there,
and the stray files that every export contains. The hold-out has all of it.

Layout::

    FOLDER/sites/<hospital>/dicom/.../*.dcm     FOLDER/holdout/dicom/.../*.dcm
    FOLDER/sites/<hospital>/labels.csv          FOLDER/holdout/labels.csv
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from cloister_fl.simulation.phantom import (
    DOTS,
    EVEN_MIX,
    ONE_STRAND,
    TWO_STRANDS,
    CaseMix,
    Pixels,
    Scanner,
    draw_patient,
    expose,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Progress: TypeAlias = Callable[[str, int, int], None]

EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_LS_LOSSLESS = "1.2.840.10008.1.2.4.80"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"
DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"
COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"

HOLDOUT = "holdout"
HOLDOUT_PATIENTS = 240
LABELS_HEADER = ("PatientID", "finding")
FINDINGS = ("normal", "nodule")

# Probabilities of 1, 2, ... 6 images of one patient: most come once, a few are followed up.
_IMAGES_PER_PATIENT = (0.60, 0.24, 0.09, 0.04, 0.02, 0.01)
_PADDING_WIDTH = 3


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


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """One file that was written.

    Attributes:
        path: the file, relative to the federation's folder.
        patient_id: the PatientID.
        stored_sha256: hex digest of the stored values as little-endian uint16, row by row, after
            inversion and padding: what an exact decoder returns.
    """

    path: Path
    patient_id: str
    stored_sha256: str


@dataclass(frozen=True, slots=True)
class DrawnCohort:
    """One labelled folder: a hospital's, or the hold-out.

    Attributes:
        name: the hospital's name, or ``holdout``.
        folder: the cohort's folder, which holds ``dicom`` and ``labels.csv``.
        findings: PatientID to ``normal`` or ``nodule``.
        images: every readable image; junk is not listed.
    """

    name: str
    folder: Path
    findings: dict[str, str]
    images: tuple[DrawnImage, ...]

    @property
    def dicom(self) -> Path:
        """The folder of the images."""
        return self.folder / "dicom"

    @property
    def labels(self) -> Path:
        """The table of findings."""
        return self.folder / "labels.csv"


@dataclass(frozen=True, slots=True)
class DrawnFederation:
    """What :func:`draw_federation` wrote.

    Attributes:
        folder: the root.
        sites: one cohort a hospital, in the order given.
        holdout: the patients that no hospital trains on, from every scanner, classes balanced.
    """

    folder: Path
    sites: tuple[DrawnCohort, ...]
    holdout: DrawnCohort


def draw_federation(
    folder: Path,
    *,
    seed: int,
    hospitals: Sequence[Hospital] = HOSPITALS,
    holdout_patients: int = HOLDOUT_PATIENTS,
    progress: Progress | None = None,
) -> DrawnFederation:
    """Draw the hospitals and the hold-out, and write them as DICOM folders.

    The whole tree is built beside ``folder`` and renamed into place, so an interrupted run leaves
    no half-drawn federation that looks like a whole one. The same seed writes the same bytes.

    Args:
        folder: where the tree goes; absent, or an empty folder.
        seed: non-negative; every image follows from it.
        hospitals: who takes part; names and prefixes are unique.
        holdout_patients: patients of the hold-out, shared as evenly as may be over the scanners.
        progress: called after each patient with the cohort's name, patients done and in all.

    Raises:
        FileExistsError: ``folder`` holds something already.
        ValueError: two hospitals share a name or a prefix.
    """
    _check_unique(hospitals)
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder.name} is not empty; generated images need a folder of their own"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    report = progress or _silent
    streams = np.random.SeedSequence(seed).spawn(2 * len(hospitals))
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        sites = []
        for hospital, stream in zip(hospitals, streams[: len(hospitals)], strict=True):
            root = Path("sites") / hospital.name
            writer = _CohortWriter(building, root, hospital.name, hospital.patients, report)
            writer.add(hospital, _labels(hospital.patients, hospital.prevalence, stream), stream, 1)
            writer.add_junk(hospital)
            sites.append(writer.finish(folder))
        writer = _CohortWriter(building, Path(HOLDOUT), HOLDOUT, holdout_patients, report)
        for place, hospital in enumerate(hospitals):
            stream = streams[len(hospitals) + place]
            count = len(range(place, holdout_patients, len(hospitals)))
            # Numbers go on where the hospital's own end: one archive, disjoint patients.
            writer.add(hospital, _labels(count, 0.5, stream), stream, hospital.patients + 1)
        holdout = writer.finish(folder)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return DrawnFederation(folder, tuple(sites), holdout)


class _CohortWriter:
    """Writes one cohort's files below a folder that is still being built."""

    def __init__(
        self, building: Path, root: Path, name: str, patients: int, report: Progress
    ) -> None:
        self._building = building
        self._root = root
        self._name = name
        self._patients = patients
        self._report = report
        self._findings: dict[str, str] = {}
        self._images: list[DrawnImage] = []

    def add(
        self,
        hospital: Hospital,
        labels: Sequence[bool],
        stream: np.random.SeedSequence,
        first: int,
    ) -> None:
        rng = np.random.default_rng(stream)
        for number, positive in enumerate(labels, start=first):
            patient = draw_patient(rng, positive=positive, mix=hospital.mix)
            patient_id = f"{hospital.prefix}{number:05d}"
            header = _patient_header(rng, hospital, patient_id)
            images = 1 + int(rng.choice(len(_IMAGES_PER_PATIENT), p=_IMAGES_PER_PATIENT))
            for image in range(1, images + 1):
                stored = _stored(expose(patient, hospital.scanner, rng), hospital)
                self._write(hospital, header, stored, image)
            self._findings[patient_id] = FINDINGS[positive]
            self._report(self._name, len(self._findings), self._patients)

    def add_junk(self, hospital: Hospital) -> None:
        """Add what exports contain besides images: each must be passed over or quarantined."""
        from pydicom import dcmread
        from pydicom.uid import UID

        dicom = self._building / self._root / "dicom"
        sample = self._building / self._images[0].path
        (dicom / "README").write_text("Export of the archive. Not for diagnostic use.\n")
        (dicom / "export-notes.txt").write_text(f"{hospital.institution}: export complete.\n")
        (dicom / "empty.dcm").write_bytes(b"")
        whole = sample.read_bytes()
        (dicom / "truncated.dcm").write_bytes(whole[: len(whole) * 2 // 5])
        bare = dcmread(sample)
        del bare.PixelData
        bare.SOPInstanceUID = _uid(hospital.name, "no-pixels")
        bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID
        bare.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
        bare.save_as(dicom / "no-pixels.dcm", enforce_file_format=True)

    def finish(self, folder: Path) -> DrawnCohort:
        with (self._building / self._root / "labels.csv").open(
            "w", newline="", encoding="utf-8"
        ) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(LABELS_HEADER)
            table.writerows(sorted(self._findings.items()))
        return DrawnCohort(
            self._name, folder / self._root, dict(self._findings), tuple(self._images)
        )

    def _write(
        self, hospital: Hospital, header: dict[str, str], stored: Pixels, number: int
    ) -> None:
        patient_id, date = header["PatientID"], header["StudyDate"]
        inner = Path(date[:4]) / date[4:] / patient_id if hospital.by_date else Path(patient_id)
        relative = self._root / "dicom" / inner / f"IM{number:04d}.dcm"
        path = self._building / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        _dataset(hospital, header, stored, number).save_as(path, enforce_file_format=True)
        digest = hashlib.sha256(stored.astype("<u2").tobytes()).hexdigest()
        self._images.append(DrawnImage(relative, patient_id, digest))


def _stored(pixels: Pixels, hospital: Hospital) -> Pixels:
    """The values that go to disk: inverted and padded as the hospital does, same shape."""
    highest = (1 << hospital.scanner.bits_stored) - 1
    stored = (highest - pixels).astype(np.uint16) if hospital.monochrome1 else pixels.copy()
    if hospital.padded:
        for edge in (np.s_[:_PADDING_WIDTH], np.s_[-_PADDING_WIDTH:]):
            stored[edge, :] = 0
            stored[:, edge] = 0
    return stored


def _dataset(hospital: Hospital, header: dict[str, str], stored: Pixels, number: int) -> Dataset:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID

    patient_id = header["PatientID"]
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE_ENDIAN)
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    data.SOPClassUID = hospital.sop_class
    data.SOPInstanceUID = _uid(hospital.name, patient_id, str(number))
    data.StudyInstanceUID = _uid(hospital.name, patient_id, "study")
    data.SeriesInstanceUID = _uid(hospital.name, patient_id, "series")
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


def _patient_header(
    rng: np.random.Generator, hospital: Hospital, patient_id: str
) -> dict[str, str]:
    """The elements that all images of a patient share; nobody's, and free of the finding."""
    family = ("Archer", "Brook", "Carver", "Dale", "Ellery", "Fenn", "Garnet", "Hale")
    given = ("Alex", "Billie", "Charlie", "Devon", "Emery", "Frankie", "Jamie", "Robin")
    day = np.datetime64("2019-01-01") + int(rng.integers(0, 1500))
    age = int(rng.integers(25, 85))
    date = str(day).replace("-", "")
    return {
        "PatientName": f"{rng.choice(family)}^{rng.choice(given)}",
        "PatientID": patient_id,
        "PatientBirthDate": f"{int(date[:4]) - age}0101",
        "PatientSex": str(rng.choice(("F", "M", "O"))),
        "StudyDate": date,
        "StudyTime": f"{int(rng.integers(7, 19)):02d}{int(rng.integers(0, 60)):02d}00",
        "AccessionNumber": f"A{hospital.prefix}{int(rng.integers(10**8)):08d}",
        "StudyID": patient_id,
        "ReferringPhysicianName": "",
    }


def _labels(patients: int, prevalence: float, stream: np.random.SeedSequence) -> list[bool]:
    """Labels in random order; the share is met to the nearest patient, both classes are kept."""
    positive = min(max(round(patients * prevalence), 1), patients - 1) if patients > 1 else 0
    labels = np.arange(patients) < positive
    np.random.default_rng((*stream.spawn_key, stream.generate_state(1)[0])).shuffle(labels)
    return [bool(label) for label in labels]


def _uid(*parts: str) -> str:
    """A UID that follows from its parts, so that the same seed writes the same file."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=["cloister phantom", *parts]))


def _check_unique(hospitals: Sequence[Hospital]) -> None:
    for values in ({each.name for each in hospitals}, {each.prefix for each in hospitals}):
        if len(values) != len(hospitals):
            raise ValueError("two hospitals share a name or a PatientID prefix")


def _silent(_name: str, _done: int, _total: int) -> None:
    return None
