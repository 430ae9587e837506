"""Images with masks, and the study that learns them, for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from cloister_fl.study.schema import Input
from support import studies
from support.ct_series import AXIAL, decimals, place
from support.dicom import make_dicom, radiograph
from support.segmentations import saved, segment, segmentation

SPEC = Input(modalities=("DX", "CT"), size=24)
STUDY = studies.study(
    input=SPEC.model_dump(),
    target={"kind": "segmentation", "segment": "lungs", "column": None, "classes": None},
    network={"name": "unet", "arguments": {"width": 4}},
)
Mask = NDArray[np.bool_]


def image(patient: str = "P1", seed: int = 0, **rest: Any) -> bytes:
    return make_dicom(radiograph(seed), bits_stored=12, patient_id=patient, **rest)


def mask(seed: int = 0, rows: int = 48, columns: int = 40) -> Mask:
    """A box, another one for each seed."""
    rng = np.random.default_rng(seed)
    marked = np.zeros((1, rows, columns), bool)
    top, left = int(rng.integers(2, rows // 2)), int(rng.integers(2, columns // 2))
    marked[0, top : top + rows // 3, left : left + columns // 3] = True
    return marked


def slices(count: int) -> list[bytes]:
    return [
        make_dicom(
            radiograph(k),
            bits_stored=12,
            modality="CT",
            elements={
                "SeriesInstanceUID": "2.25.7",
                "StudyInstanceUID": "2.25.6",
                "FrameOfReferenceUID": "2.25.8",
                "ImagePositionPatient": decimals(place(k)),
                "ImageOrientationPatient": decimals([*AXIAL[0], *AXIAL[1]]),
                "PixelSpacing": ["1", "1"],
                "SliceThickness": "1",
            },
        )
        for k in range(count)
    ]


def uid_of(file: bytes) -> str:
    return str(dcmread(io.BytesIO(file), stop_before_pixels=True).SOPInstanceUID)


def write(folder: Path, patients: int = 6, *, empty: int = 1) -> dict[str, Mask]:
    """Two images a patient, with a segmentation each; nothing is marked in the last ``empty``."""
    dicom = folder / "dicom"
    dicom.mkdir(parents=True)
    marked = {}
    for number in range(patients):
        for place_ in range(2):
            seed = 10 * number + place_
            name = f"MRN{number:05d}"
            source = image(name, seed)
            box = mask(seed) if number < patients - empty else np.zeros((1, 48, 40), bool)
            (dicom / f"{number}-{place_}.dcm").write_bytes(source)
            (dicom / f"{number}-{place_}-seg.dcm").write_bytes(written(source, box))
            marked[uid_of(source)] = box[0]
    return marked


def written(source: bytes, box: Mask) -> bytes:
    """highdicom drops empty frames, and then all: it keeps one if it is told to."""
    if box.any():
        return segment([source], box)
    full = segmentation([source], np.ones_like(box))
    full.PixelData = bytes(len(full.PixelData))
    return saved(full)


def by_area(marked: Mask, size: int) -> NDArray[np.uint8]:
    """1 where half of the area or more is marked, by a count on the finest common grid."""
    rows, columns = marked.shape
    fine = marked.repeat(size, axis=0).repeat(size, axis=1)
    share = fine.reshape(size, rows, size, columns).mean(axis=(1, 3))
    return (share >= 0.5).astype(np.uint8)
