"""Folder reader: a folder of DICOM files to preprocessed images, one outcome a file.

    discover -> read -> cache, or: worker (precheck -> decode -> preprocess) -> cache

The workers are processes of their own, several at a time (``pool``); here the outcomes are put
in order again. Each file ends as an ``Accepted`` image or as a ``Refused`` reason. Nothing is
logged; a file is spoken of by a short keyed hash of its path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.file_finder import discover
from cloister_fl.client.dicom.geometry import Place
from cloister_fl.client.dicom.mask_table import MODALITY, Masks
from cloister_fl.client.dicom.read_ahead import Item, Memory, Reader, Waiting
from cloister_fl.client.dicom.sandbox.pool import Reading
from cloister_fl.client.dicom.stored_image import HeldImage, StoredImage
from cloister_fl.errors import FolderUnreadable, Reject
from cloister_fl.study.schema import Input


@dataclass(frozen=True, slots=True)
class Keys:
    """What an image can be linked by. Stays inside the site, and out of ``repr``."""

    sop_instance: str = field(repr=False)
    accession: str = field(repr=False)
    patient_id: str = field(repr=False)
    issuer: str = field(repr=False)
    study_instance: str = field(default="", repr=False)


@dataclass(frozen=True, eq=False, slots=True)
class Accepted:
    """An image that may be used.

    Attributes:
        short_id: 12 hexadecimal digits that stand for the file, keyed by the caller's key.
        keys: what it can be linked by.
        facts: all else that is known of it; the identifiers are not in its ``repr``.
        image: where its shades are; (size, size), of a volume (depth, size, size).
        content: keyed hash of the file's content, 32 bytes; empty without a memory.
        damaged: whether what the cache held of it did not bear its seal. It was decoded anew.
    """

    short_id: str
    keys: Keys
    facts: Facts
    image: StoredImage = field(repr=False)
    content: bytes = b""
    damaged: bool = False

    @property
    def place(self) -> Place:
        """Where a slice of CT or MR lies."""
        return self.facts.place


@dataclass(frozen=True, eq=False)
class Segmented:
    """A segmentation that may be used.

    Attributes:
        short_id, keys, facts, content, damaged: see ``Accepted``; rows and columns are the
            images'.
        masks: what it marks.
    """

    short_id: str
    keys: Keys
    facts: Facts
    masks: Masks = field(repr=False)
    content: bytes = b""
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that was turned away.

    Attributes:
        short_id: see ``Accepted``.
        reason: why.
        keys: set for a duplicate, whose label still counts.
        content: see ``Accepted``.
    """

    short_id: str
    reason: Reject
    keys: Keys | None = None
    content: bytes = b""


def read_folder(
    dicom: Path,
    spec: Input,
    *,
    key: bytes,
    memory: Memory | None = None,
    also: Sequence[Item] = (),
    segment: str = "",
    first: Collection[bytes] = frozenset(),
    alone: bool = False,
    unit: Callable[[Keys], tuple[str, ...]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Accepted | Segmented | Refused]:
    """Yield the outcome of each file, in the order of the paths; segmentations after all others.

    What one patient's files hold has no bearing on another's: only within a patient is a file a
    duplicate. Else a patient who comes could take another's images out, and the sum over patients
    would move by more than one patient's share.

    Args:
        dicom: the folder.
        spec: the study's input.
        key: keys the short names of files; the site's pseudonym key, or any secret.
        memory: what is known from before, and takes up what is new; or None.
        also: files from elsewhere, read after those of the folder.
        segment: what is marked in the segmentations of the folder; empty to turn them away.
        first: contents, as ``Memory`` names them, that come before all others: of two files of one
            image the first is used.
        unit: what stands for an image's patient; else issuer and number as they are.
        alone: turn a file away where reading it fails in any way, and go on with the others; a
            folder that cannot be listed is an empty one.
        progress: called with (files done, files in all) after each file.

    Raises:
        FolderUnreadable: the folder cannot be listed.
        DecoderUnfit: a decoder fails its known-answer test, or no worker can be started.
        Neither with ``alone``.
    """
    found: tuple[Item, ...] = (*_listed(dicom, alone=alone), *also)
    judge = _Judge(key, spec, unit or record_of, memory)
    later: dict[Item, Waiting] = {}
    segmentations: dict[Item, Waiting] = {}
    with Reader(spec, memory, segment, alone=alone) as reader:
        for done, (waiting, reading) in enumerate(reader.read(found), start=1):
            if progress is not None:
                progress(done, len(found))
            if not isinstance(reading, Reject) and reading[0].modality == MODALITY:
                # Their tables can be many times as large as the files: one at a time, from the
                # cache, when all images are known.
                segmentations[waiting.found] = dataclasses.replace(waiting, done=None, future=None)
            elif first and waiting.content not in first and not isinstance(reading, Reject):
                # Their pixels, kept until all others are read, would fill the memory.
                later[waiting.found] = dataclasses.replace(waiting, done=None, future=None)
            else:
                yield judge.image(waiting, reading)
        for waiting, reading in reader.read(list(later), ahead=0):
            damaged = waiting.damaged or later[waiting.found].damaged
            yield judge.image(dataclasses.replace(waiting, damaged=damaged), reading)
        ordered = sorted(
            segmentations, key=lambda one: bool(first) and segmentations[one].content not in first
        )
        for waiting, reading in reader.read(ordered, ahead=0):
            damaged = waiting.damaged or segmentations[waiting.found].damaged
            yield judge.segmentation(dataclasses.replace(waiting, damaged=damaged), reading)


def _listed(dicom: Path, *, alone: bool) -> Sequence[Item]:
    try:
        return discover(dicom)
    except FolderUnreadable:
        if not alone:
            raise
        return ()


class _Judge:
    """Turns away what was there before.

    Args:
        key: keys the short names of files.
        spec: the study's input.
        unit, memory: see ``read_folder``.
    """

    def __init__(
        self,
        key: bytes,
        spec: Input,
        unit: Callable[[Keys], tuple[str, ...]],
        memory: Memory | None,
    ) -> None:
        self._key = key
        self._memory = memory
        self._spec = spec
        self._unit = unit
        self._seen: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def image(self, waiting: Waiting, reading: Reading | Reject) -> Accepted | Refused:
        """Judge an image.

        In a stack of slices two may look alike, such as air; not at one position.
        """
        name = short_id(self._key, waiting.found.name)
        if isinstance(reading, Reject):
            return Refused(name, reading, content=waiting.content)
        facts, image = reading
        keys = _keys(facts)
        place = (facts.series, facts.position) if self._spec.dimensions == 3 else ()
        if self._again(keys, ("image", keys.sop_instance), ("pixels", facts.pixels, *place)):
            return Refused(name, Reject.DUPLICATE, keys, content=waiting.content)
        stored = self._stored(waiting, image)
        return Accepted(name, keys, facts, stored, waiting.content, waiting.damaged)

    def _stored(self, waiting: Waiting, image: NDArray[np.uint16]) -> StoredImage:
        """Where the shades are from now on: in the cache, if it has them."""
        if self._memory is None or not waiting.entry:
            return HeldImage(image)
        return self._memory.cache.image(waiting.entry, image)

    def segmentation(self, waiting: Waiting, reading: Reading | Reject) -> Segmented | Refused:
        """Judge a segmentation; a file that is none any more changed while it was read."""
        name = short_id(self._key, waiting.found.name)
        if isinstance(reading, Reject):
            return Refused(name, reading, content=waiting.content)
        facts, table = reading
        if facts.modality != MODALITY:
            return Refused(name, Reject.UNREADABLE, content=waiting.content)
        keys = _keys(facts)
        if self._again(keys, ("segmentation", keys.sop_instance)):
            return Refused(name, Reject.DUPLICATE, content=waiting.content)
        masks = Masks(table, self._spec.size)
        return Segmented(name, keys, facts, masks, waiting.content, waiting.damaged)

    def _again(self, keys: Keys, *traits: tuple[str, ...]) -> bool:
        """Whether the patient had one with one of these traits before; remembers them if not."""
        patient = self._unit(keys)
        named = {(patient, trait) for trait in traits}
        if not named.isdisjoint(self._seen):
            return True
        self._seen |= named
        return False


def record_of(keys: Keys) -> tuple[str, ...]:
    """A patient's issuer and number, as a file has them."""
    return keys.issuer.strip(), keys.patient_id.strip()


def _keys(facts: Facts) -> Keys:
    return Keys(
        facts.sop_instance, facts.accession, facts.patient_id, facts.issuer, facts.study_instance
    )


def short_id(key: bytes, name: bytes) -> str:
    """Name a file without its path: 12 hexadecimal digits, keyed."""
    return hmac.new(key, b"file\0" + name, hashlib.sha256).hexdigest()[:12]
