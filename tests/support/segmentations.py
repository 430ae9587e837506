"""DICOM Segmentations for tests, written by highdicom as another program would."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from support.dicom import uid

ORGAN = CodedConcept("39607008", "SCT", "Lung structure")
CATEGORY = CodedConcept("123037004", "SCT", "Anatomical structure")

_PATIENT = ("PatientName", "PatientBirthDate", "PatientSex", "StudyID", "ReferringPhysicianName")


def describe(number: int, label: str) -> Any:
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=CATEGORY,
        segmented_property_type=ORGAN,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )


def segmentation(
    sources: Sequence[bytes],
    masks: NDArray[np.bool_],
    *,
    labels: Sequence[str] = ("lungs",),
    kind: str = "BINARY",
    name: object = "",
    transfer_syntax: str = "1.2.840.10008.1.2.1",
) -> Dataset:
    """Mark what ``masks`` mark.

    Args:
        sources: files of the images, of one series.
        masks: (images, rows, columns), or (images, rows, columns, segments).
        labels: of the segments.
        name: tells one segmentation of the same images from another.
    """
    images = [dcmread(io.BytesIO(source)) for source in sources]
    for image in images:
        for keyword in _PATIENT:
            if keyword not in image:
                setattr(image, keyword, "")
        image.setdefault("StudyInstanceUID", uid("study", image.PatientID))
        image.setdefault("SeriesInstanceUID", uid("series", image.PatientID))
        for keyword in ("StudyDate", "StudyTime"):
            image.setdefault(keyword, None)
    first = images[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hd.seg.Segmentation(
            source_images=images,
            pixel_array=masks if masks.ndim == 4 else masks.astype(np.uint8),
            segmentation_type=kind,
            segment_descriptions=[
                describe(place, label) for place, label in enumerate(labels, start=1)
            ],
            series_instance_uid=uid("masks", first.SOPInstanceUID, name),
            series_number=9,
            sop_instance_uid=uid("mask", first.SOPInstanceUID, name),
            instance_number=1,
            manufacturer="Nobody",
            manufacturer_model_name="None",
            software_versions="1",
            device_serial_number="1",
            transfer_syntax_uid=transfer_syntax,
        )


def saved(data_set: Dataset) -> bytes:
    """The bytes of its file."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data_set.save_as(out, enforce_file_format=True)
    return out.getvalue()


def segment(sources: Sequence[bytes], masks: NDArray[np.bool_], **rest: Any) -> bytes:
    """The file of a segmentation; see ``segmentation``."""
    return saved(segmentation(sources, masks, **rest))
