"""Digest of everything that shapes preprocessed pixels: a key of caches and frozen data."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The process with the data has no use for pydicom, nor a worker for pydantic.
    from cloister_fl.study.schema import Input


SPEC_LABEL = b"cloister/preprocess/v1\0"
"""Changes whenever the same input would give another tensor."""


def spec_digest(spec: Input, segment: str = "") -> str:
    """SHA-256 of everything that shapes an image or a mask, 64 hexadecimal digits.

    Args:
        spec: the study's input.
        segment: what is marked; empty where no segmentation is read.
    """
    # Late: a worker loads this module, and has no use for these.
    from cloister_fl.encoding.canonical_json import canonical_json
    from cloister_fl.study.schema import VOLUME_KEYS

    # A volume is made of images that are read as any other.
    shape = spec.model_dump(mode="json", exclude=set(VOLUME_KEYS))
    text = canonical_json(shape)
    if segment:
        text += json.dumps({"segment": segment})
    return hashlib.sha256(SPEC_LABEL + text.encode()).hexdigest()
