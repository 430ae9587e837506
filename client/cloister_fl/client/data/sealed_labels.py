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
_ROW = 256
"""Characters of a row are filled up to a multiple of this, all to the same: the length of what is
sealed would count patients, where the words of two classes are of two lengths."""


def seal_labels(key: bytes, study: str, cells: Mapping[Named, Cells]) -> str:
    """Seal the labels of a study's images.

    Args:
        key: the site's pseudonym key.
        study: ``Study.digest``.
        cells: by image and patient; none of a study whose targets are no labels.

    Returns:
        Hexadecimal digits; other ones each time.
    """
    held = sorted((image, patient, list(one)) for (image, patient), one in cells.items())
    rows = [json.dumps(one) for one in held]
    width = -(-max(map(len, rows), default=0) // _ROW) * _ROW
    text = f"[{','.join(row.ljust(width) for row in rows)}]"
    nonce = os.urandom(_NONCE)
    sealed = _cipher(key).encrypt(nonce, text.encode(), study.encode())
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
