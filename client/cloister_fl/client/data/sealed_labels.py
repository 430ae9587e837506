"""Labels that a study's data were frozen with, sealed with a key of the site.

A run with privacy takes them from here and not from the labels file: what stands in that file for
one patient, or what another's row does to its parse, then has no bearing on anybody's label. A
manifest can still be shown: the labels are encrypted, all together.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Cells: TypeAlias = tuple[str, ...]
"""Cells of a row of the labels file, as ``Task.record`` reads them."""
Named: TypeAlias = tuple[str, str]
"""Pseudonyms of an image and of its patient."""

_LABEL = b"cloister/manifest-labels/v1"
_NONCE = 12


def seal_labels(key: bytes, study: str, cells: Mapping[Named, Cells]) -> str:
    """Seal the labels of a study's images.

    Args:
        key: the site's pseudonym key.
        study: ``Study.digest``.
        cells: by image and patient; none of a study whose targets are no labels.

    Returns:
        Hexadecimal digits; other ones each time.
    """
    rows = sorted((image, patient, list(one)) for (image, patient), one in cells.items())
    nonce = os.urandom(_NONCE)
    sealed = _cipher(key).encrypt(nonce, json.dumps(rows).encode(), study.encode())
    return (nonce + sealed).hex()


def open_labels(key: bytes, study: str, sealed: str) -> dict[Named, Cells]:
    """Open what ``seal_labels`` made.

    Raises:
        ValueError: it is nothing that this site sealed for this study.
    """
    data = bytes.fromhex(sealed)
    try:
        text = _cipher(key).decrypt(data[:_NONCE], data[_NONCE:], study.encode())
    except InvalidTag:
        raise ValueError("the labels were sealed with another key, or altered") from None
    return {(image, patient): tuple(cells) for image, patient, cells in json.loads(text)}


def _cipher(key: bytes) -> AESGCM:
    return AESGCM(hmac.new(key, _LABEL, hashlib.sha256).digest())
