"""Wrap the Kermany chest radiographs into DICOM: five uneven hospitals and a hold-out.

Source: Kermany, Zhang, Goldbaum, "Labeled Optical Coherence Tomography (OCT) and Chest X-Ray
Images for Classification", Mendeley Data, 2018, CC BY 4.0. Patients of the published training
split go to the hospitals, whole; the published test split becomes the hold-out.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from cloister_fl.system.git_ignore import keep_out_of_git

# Name, share of all patients, and share of its patients that have pneumonia.
HOSPITALS = (
    ("north", 0.40, 0.60),
    ("east", 0.25, 0.45),
    ("south", 0.15, 0.70),
    ("west", 0.12, 0.50),
    ("harbour", 0.08, 0.65),
)
LABELS = ("normal", "pneumonia")


@dataclass(frozen=True)
class Patient:
    """One patient: name in the manifest, label (1: pneumonia), file names in the archive."""

    name: str
    label: int
    files: tuple[str, ...]


def read_manifest(source: Path) -> dict[str, list[Patient]]:
    """Patients by split, in the order of their names."""
    files: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    with (source / "manifest.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            files[row["split"], row["patient"], int(row["pneumonia"])].append(row["file"])
    patients: dict[str, list[Patient]] = {"train": [], "test": []}
    for (split, name, label), names in sorted(files.items()):
        patients[split].append(Patient(name, label, tuple(sorted(names))))
    return patients


def assign(patients: list[Patient], seed: int = 0) -> dict[str, list[Patient]]:
    """Share patients out: the hospitals differ in size and in how many are ill."""
    rng = np.random.default_rng(seed)
    pools = {
        label: list(rng.permutation([i for i, p in enumerate(patients) if p.label == label]))
        for label in (0, 1)
    }
    shares: dict[str, list[Patient]] = {}
    for position, (name, share, ill) in enumerate(HOSPITALS):
        last = position == len(HOSPITALS) - 1
        size = round(share * len(patients))
        counts = {1: round(size * ill), 0: size - round(size * ill)}
        chosen: list[int] = []
        for label, pool in pools.items():
            take = len(pool) if last else min(counts[label], len(pool))
            chosen += pool[:take]
            del pool[:take]
        shares[name] = [patients[i] for i in sorted(chosen)]
    return shares


def wrap(archive: zipfile.ZipFile, folder: Path, patients: Iterable[Patient]) -> int:
    """Write patients' files below ``folder/dicom`` and their labels; return the file count."""
    count = 0
    rows = []
    for patient in patients:
        rows.append((patient.name, LABELS[patient.label]))
        target = folder / "dicom" / patient.name
        target.mkdir(parents=True)
        for number, name in enumerate(patient.files, start=1):
            pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L"))
            dataset(patient.name, number, pixels).save_as(
                target / f"{number:03d}.dcm", enforce_file_format=True
            )
            count += 1
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("PatientID", "finding"), *rows])
    return count


def dataset(patient: str, number: int, pixels: np.ndarray) -> Dataset:
    """One 8-bit computed radiograph; what the JPEG does not say is left out."""
    uid = generate_uid(entropy_srcs=[patient, str(number)])
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = uid
    made.SOPClassUID = ComputedRadiographyImageStorage
    made.SOPInstanceUID = uid
    made.StudyInstanceUID = generate_uid(entropy_srcs=[patient, "study"])
    made.SeriesInstanceUID = generate_uid(entropy_srcs=[patient, "series"])
    made.PatientID = patient
    made.PatientName = ""
    made.Modality = "CR"
    made.BodyPartExamined = "CHEST"
    made.BurnedInAnnotation = "NO"
    made.InstanceNumber = number
    made.SamplesPerPixel = 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.Rows, made.Columns = pixels.shape
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit = 7
    made.PixelRepresentation = 0
    made.PixelData = pixels.tobytes()
    return made


def main() -> None:
    """Read SOURCE, write OUT; OUT appears only when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with images.zip and manifest.csv")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    options = parser.parse_args()
    if not (options.source / "images.zip").is_file():
        sys.exit(f"{options.source} holds no images.zip; nothing was written.")
    if options.out.exists():
        sys.exit(f"{options.out} exists already; name another folder.")
    building = options.out.with_name(options.out.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    keep_out_of_git(building)
    patients = read_manifest(options.source)
    with zipfile.ZipFile(options.source / "images.zip") as archive:
        for name, share in assign(patients["train"]).items():
            files = wrap(archive, building / "sites" / name, share)
            ill = sum(patient.label for patient in share)
            print(f"{name}: {len(share)} patients, {ill} with pneumonia, {files} images")
        files = wrap(archive, building / "holdout", patients["test"])
        print(f"hold-out: {len(patients['test'])} patients, {files} images")
    building.rename(options.out)


if __name__ == "__main__":
    main()
