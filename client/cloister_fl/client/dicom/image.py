"""Preprocessed image and facts of a DICOM file that passed ``acceptance.precheck``."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.acceptance import Checked
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.pixels.decoders import decode
from cloister_fl.client.dicom.pixels.preprocess import Recipe, preprocess


def read_image(checked: Checked, recipe: Recipe) -> tuple[Facts, NDArray[np.uint16]]:
    """Decode and preprocess one image.

    Args:
        checked: what ``acceptance.precheck`` cut out of the file.
        recipe: the study's input.

    Returns:
        What is known of it, and its shades of grey, shape (size, size).

    Raises:
        RejectedFile: ``DECODE_FAILED`` or ``PIXEL_FORMAT``.
        DecoderUnfit: the decoder fails its known-answer test.
    """
    tags, layout = checked.tags, checked.tags.layout
    stored = decode(checked.pixels, checked.transfer_syntax, layout)
    image = preprocess(stored, layout, tags.grayscale, recipe)
    # Two bytes hold every value, with a word on their sign: hashing is a good part of the cost.
    dtype = "<i2" if stored.min() < 0 else "<u2"
    size = f"{layout.rows}x{layout.columns}"
    described = hashlib.sha256(f"{tags.photometric}/{size}/{dtype}/".encode())
    described.update(np.ascontiguousarray(stored, dtype=dtype).data)
    facts = Facts(
        rows=layout.rows,
        columns=layout.columns,
        pixels=described.hexdigest(),
        modality=tags.modality,
        manufacturer=tags.manufacturer,
        year=tags.year,
        sop_instance=tags.sop_instance,
        accession=tags.accession,
        patient_id=tags.patient_id,
        issuer=tags.issuer,
        person=checked.person,
        study_instance=tags.study_instance,
        sex=tags.sex,
        age=tags.age,
        **dataclasses.asdict(tags.place),
    )
    return facts, image
