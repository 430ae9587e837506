"""Five hospitals and a hold-out, written as the DICOM folders that real ones would hand over.

The images come from :mod:`cloister_fl.simulation.phantom`, what makes hospitals differ from
:mod:`cloister_fl.simulation.synthetic_hospitals`. This module adds the folders, the labels and the
stray files that every export contains. The hold-out has images of all hospitals.

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
from typing import TypeAlias

import numpy as np

from cloister_fl.simulation.phantom import Pixels, draw_patient, expose
from cloister_fl.simulation.synthetic_dicom import (
    dataset,
    derived_uid,
    patient_header,
    stored_values,
)
from cloister_fl.simulation.synthetic_hospitals import EXPLICIT_LITTLE_ENDIAN, HOSPITALS, Hospital

Progress: TypeAlias = Callable[[str, int, int], None]

HOLDOUT = "holdout"
HOLDOUT_PATIENTS = 240
LABELS_HEADER = ("PatientID", "finding")
FINDINGS = ("normal", "nodule")

# Probabilities of 1, 2, ... 6 images of one patient: most come once, a few are followed up.
_IMAGES_PER_PATIENT = (0.60, 0.24, 0.09, 0.04, 0.02, 0.01)


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
            header = patient_header(rng, hospital, patient_id)
            images = 1 + int(rng.choice(len(_IMAGES_PER_PATIENT), p=_IMAGES_PER_PATIENT))
            for image in range(1, images + 1):
                stored = stored_values(expose(patient, hospital.scanner, rng), hospital)
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
        bare.SOPInstanceUID = derived_uid(hospital.name, "no-pixels")
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
        dataset(hospital, header, stored, number).save_as(path, enforce_file_format=True)
        digest = hashlib.sha256(stored.astype("<u2").tobytes()).hexdigest()
        self._images.append(DrawnImage(relative, patient_id, digest))


def _labels(patients: int, prevalence: float, stream: np.random.SeedSequence) -> list[bool]:
    """Labels in random order; the share is met to the nearest patient, both classes are kept."""
    positive = min(max(round(patients * prevalence), 1), patients - 1) if patients > 1 else 0
    labels = np.arange(patients) < positive
    np.random.default_rng((*stream.spawn_key, stream.generate_state(1)[0])).shuffle(labels)
    return [bool(label) for label in labels]


def _check_unique(hospitals: Sequence[Hospital]) -> None:
    for values in ({each.name for each in hospitals}, {each.prefix for each in hospitals}):
        if len(values) != len(hospitals):
            raise ValueError("two hospitals share a name or a PatientID prefix")


def _silent(_name: str, _done: int, _total: int) -> None:
    return None
