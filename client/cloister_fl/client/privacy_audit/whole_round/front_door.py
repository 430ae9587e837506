"""A made-up site with DICOM files and a labels file of its own, which it reads as any site does.

The model that is sent is right of one class and wrong of the other, whatever an image shows, so
what each patient adds is known although the pixels went through decoding and preprocessing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.audited_studies import small_study
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.privacy_audit.whole_round.influence_claims import judge_update
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import kinds_of
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import ThrowawaySite
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.errors import InternalError
from cloister_fl.study.cost import charges

_DX = "1.2.840.10008.5.1.4.1.1.1.1"
_SIDE = 24
_IMAGES = 2
_COUNTS = (4, 8)
"""Patients of the first class, of whom the model is right, and of the second."""
_SURE = 7.0
"""The last layer's biases: sure enough that a gradient is 1, small enough for the float32 grid."""


def judge_front_door(evidence: Evidence, folder: Path) -> None:
    """Have a site prepare a study on files, then ask for its rounds.

    Where the site declines, as where decoding takes too long on a machine that is busy, nothing
    left it, and nothing is judged.

    Args:
        evidence: where tests are counted.
        folder: private; the site is made in it.
    """
    study = small_study("front-door", rounds=2, steps=2, clip=1.0)
    reference = Reference(study)
    model = np.zeros_like(reference.first)
    model[reference.layers[-1][1]] = np.array([_SURE, -_SURE], np.float32)
    site = ThrowawaySite(folder / "site", study, model)
    _write(site.site.dicom, site.site.labels, list(study.task.strata))
    site.prepare()
    for notice in data_notices(site.site.root).values():
        # Images that a slow machine did not decode in time count as absent: no fault of the step.
        raise InternalError(
            "The made-up images of the audit could not be read.",
            why=notice.message,
            remedy="Repeat the audit while the machine does little else.",
        )
    sigma, kinds = charges(study).step.noise_multiplier, kinds_of(study, 2)
    for number in range(1, study.training.rounds + 1):
        law = reference.law(kinds, _COUNTS, model, noise_multiplier=sigma, number=number)
        update = site.train(number, model)
        where = f"round {number} on DICOM files"
        judge_update(evidence, where, reference, law, _COUNTS, update, Claim.INFLUENCE)


def _write(dicom: Path, labels: Path, classes: list[str]) -> None:
    generator, rows = np.random.default_rng(0), ["PatientID,finding"]
    dicom.mkdir(parents=True)
    for place in range(sum(_COUNTS)):
        patient = f"MADE-UP-{place}"
        rows.append(f"{patient},{classes[int(place >= _COUNTS[0])]}")
        for image in range(_IMAGES):
            pixels = generator.integers(0, 4096, (_SIDE, _SIDE)).astype(np.uint16)
            _write_image(dicom / f"{place}-{image}.dcm", patient, pixels)
    labels.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_image(path: Path, patient: str, pixels: NDArray[np.uint16]) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.filewriter import dcmwrite
    from pydicom.uid import UID, ExplicitVRLittleEndian

    data_set, meta = Dataset(), FileMetaDataset()
    number = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:15], "big")
    data_set.SOPClassUID = meta.MediaStorageSOPClassUID = UID(_DX)
    data_set.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = UID(f"2.25.{number}")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data_set.Modality, data_set.PatientID = "DX", patient
    data_set.BurnedInAnnotation = "NO"
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = 1, "MONOCHROME2"
    data_set.Rows, data_set.Columns = pixels.shape
    data_set.BitsAllocated, data_set.BitsStored, data_set.HighBit = 16, 12, 11
    data_set.PixelRepresentation = 0
    data_set.PixelData = pixels.astype("<u2").tobytes()
    data_set["PixelData"].VR = "OW"
    data_set.file_meta, data_set.preamble = meta, bytes(128)
    with path.open("wb") as file:
        dcmwrite(file, data_set, enforce_file_format=True)
