"""Read a folder of DICOM files into preprocessed images, one outcome a file.

    discover -> read -> cache, or: precheck -> decode -> preprocess -> cache

Each file ends as an ``Accepted`` image or as a ``Refused`` reason. Nothing is logged; a file is
spoken of by a short keyed hash of its path.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_client.dicom.decode import decode
from cloister_client.dicom.discover import Found, discover, read_file
from cloister_client.dicom.precheck import precheck
from cloister_client.dicom.preprocess import preprocess, spec_digest
from cloister_client.dicom.reject import RejectedFile
from cloister_common.errors import Reject
from cloister_common.study import Input

Facts = dict[str, str | int]


class ImageCache(Protocol):
    """What ``read_folder`` needs of a cache; see ``cloister_client.cache``."""

    def name(self, content: bytes, spec: str) -> str: ...

    def get(self, name: str) -> tuple[Facts, NDArray[np.uint16]] | None: ...

    def put(self, name: str, facts: Facts, image: NDArray[np.uint16]) -> None: ...


@dataclass(frozen=True)
class Keys:
    """What an image can be linked by. Stays inside the site, and out of ``repr``."""

    sop_instance: str = field(repr=False)
    accession: str = field(repr=False)
    patient_id: str = field(repr=False)
    issuer: str = field(repr=False)


@dataclass(frozen=True, eq=False)
class Accepted:
    """An image that may be used.

    Attributes:
        short_id: 12 hexadecimal digits that stand for the file, keyed by the caller's key.
        keys: what it can be linked by.
        modality: CR, DX, MG, CT or MR.
        rows, columns: size of the image as it was stored.
        image: shades of grey, uint16, shape (size, size).
    """

    short_id: str
    keys: Keys
    modality: str
    rows: int
    columns: int
    image: NDArray[np.uint16] = field(repr=False)


@dataclass(frozen=True)
class Refused:
    """A file that was turned away; ``keys`` is set for a duplicate, whose label still counts."""

    short_id: str
    reason: Reject
    keys: Keys | None = None


def read_folder(
    dicom: Path,
    spec: Input,
    *,
    key: bytes,
    cache: ImageCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Accepted | Refused]:
    """Yield the outcome of each file, in the order of the paths.

    Args:
        dicom: the folder.
        spec: the study's input.
        key: keys the short names of files; the site's pseudonym key, or any secret.
        cache: where preprocessed images are kept, or None.
        progress: called with (files done, files in all) after each file.

    Raises:
        FolderUnreadable: the folder cannot be listed.
        DecoderUnfit: a decoder fails its known-answer test.
    """
    found = discover(dicom)
    digest = spec_digest(spec)
    instances: set[str] = set()
    pixels: set[tuple[str, str, str]] = set()
    for done, one in enumerate(found, start=1):
        outcome, pixel_hash = _outcome(one, _short_id(key, one, dicom), spec, digest, cache)
        if isinstance(outcome, Accepted):
            keys = outcome.keys
            same = (keys.issuer, keys.patient_id, pixel_hash)
            if keys.sop_instance in instances or same in pixels:
                outcome = Refused(outcome.short_id, Reject.DUPLICATE, keys)
            else:
                instances.add(keys.sop_instance)
                pixels.add(same)
        if progress is not None:
            progress(done, len(found))
        yield outcome


def _outcome(
    one: Found, short_id: str, spec: Input, digest: str, cache: ImageCache | None
) -> tuple[Accepted | Refused, str]:
    if one.reason is not None:
        return Refused(short_id, one.reason), ""
    try:
        data = read_file(one.path)
        name = cache.name(hashlib.sha256(data).digest(), digest) if cache is not None else ""
        entry = cache.get(name) if cache is not None else None
        if entry is None:
            entry = _read(data, spec)
            if cache is not None:
                cache.put(name, *entry)
    except RejectedFile as rejected:
        return Refused(short_id, rejected.reason), ""
    facts, image = entry
    keys = Keys(
        sop_instance=str(facts["sop_instance"]),
        accession=str(facts["accession"]),
        patient_id=str(facts["patient_id"]),
        issuer=str(facts["issuer"]),
    )
    accepted = Accepted(
        short_id, keys, str(facts["modality"]), int(facts["rows"]), int(facts["columns"]), image
    )
    return accepted, str(facts["pixels"])


def _read(data: bytes, spec: Input) -> tuple[Facts, NDArray[np.uint16]]:
    """Check, decode and preprocess the bytes of one file."""
    checked = precheck(data, spec.modalities)
    tags, layout = checked.tags, checked.tags.layout
    stored = decode(checked.pixels, checked.transfer_syntax, layout)
    image = preprocess(stored, layout, tags.grayscale, spec)
    described = f"{tags.photometric}/{layout.rows}x{layout.columns}/".encode()
    facts: Facts = {
        "sop_instance": tags.sop_instance,
        "accession": tags.accession,
        "patient_id": tags.patient_id,
        "issuer": tags.issuer,
        "modality": tags.modality,
        "rows": layout.rows,
        "columns": layout.columns,
        "pixels": hashlib.sha256(described + stored.astype("<i4").tobytes()).hexdigest(),
    }
    return facts, image


def _short_id(key: bytes, one: Found, root: Path) -> str:
    # Relative to the folder as it was given, so that moving it whole keeps the names.
    relative = os.path.relpath(one.path, root.resolve())
    return hmac.new(key, b"file\0" + os.fsencode(relative), hashlib.sha256).hexdigest()[:12]
