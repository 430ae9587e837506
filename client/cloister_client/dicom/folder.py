"""Read a folder of DICOM files into preprocessed images, one outcome a file.

    discover -> read -> cache, or: worker (precheck -> decode -> preprocess) -> cache

The workers are processes of their own, several at a time (``pool``); here the outcomes are put
in order again. Each file ends as an ``Accepted`` image or as a ``Refused`` reason. Nothing is
logged; a file is spoken of by a short keyed hash of its path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_client.dicom.discover import discover
from cloister_client.dicom.geometry import Place
from cloister_client.dicom.pool import Reading, shared_pool
from cloister_client.dicom.preprocess import spec_digest
from cloister_client.dicom.reject import RejectedFile
from cloister_client.dicom.wire import TEXTS, Facts
from cloister_common.errors import Reject
from cloister_common.study import Input

_AHEAD_BYTES = 128 << 20
"""Most bytes of files that are read ahead, the one file at hand apart."""


class Item(Protocol):
    """Where the bytes of one file come from; see ``discover.Found``."""

    @property
    def name(self) -> bytes: ...

    @property
    def reason(self) -> Reject | None: ...

    def read(self) -> bytes: ...

    def stamp(self) -> str: ...


class ImageCache(Protocol):
    """What ``read_folder`` needs of a cache; see ``cloister_client.cache``."""

    def name(self, content: bytes, spec: str) -> str: ...

    def get(self, name: str) -> tuple[dict[str, str | int], NDArray[np.uint16]] | None: ...

    def put(self, name: str, facts: Mapping[str, str | int], image: NDArray[np.uint16]) -> None: ...


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
        image: shades of grey, uint16, shape (size, size); a volume has (depth, size, size).
        place: where a slice of CT or MR lies.
    """

    short_id: str
    keys: Keys
    modality: str
    rows: int
    columns: int
    image: NDArray[np.uint16] = field(repr=False)
    place: Place = field(default=Place(), repr=False)


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
    also: Sequence[Item] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Accepted | Refused]:
    """Yield the outcome of each file, in the order of the paths.

    Args:
        dicom: the folder.
        spec: the study's input.
        key: keys the short names of files; the site's pseudonym key, or any secret.
        cache: where preprocessed images are kept, or None.
        also: files from elsewhere, read after those of the folder.
        progress: called with (files done, files in all) after each file.

    Raises:
        FolderUnreadable: the folder cannot be listed.
        DecoderUnfit: a decoder fails its known-answer test, or no worker can be started.
    """
    found: tuple[Item, ...] = (*discover(dicom), *also)
    instances: set[str] = set()
    pixels: set[tuple[str, ...]] = set()
    stacks = spec.dimensions == 3
    with _Reader(spec, cache) as reader:
        for done, (one, reading) in enumerate(reader.read(found), start=1):
            outcome = _judge(short_id(key, one.name), reading, instances, pixels, stacks)
            if progress is not None:
                progress(done, len(found))
            yield outcome


def _judge(
    short_id: str,
    reading: Reading | Reject,
    instances: set[str],
    pixels: set[tuple[str, ...]],
    stacks: bool,
) -> Accepted | Refused:
    """Turn away what was there before; ``instances`` and ``pixels`` remember it.

    In a stack of slices (``stacks``) two may look alike, such as air; not at one position.
    """
    if isinstance(reading, Reject):
        return Refused(short_id, reading)
    facts, image = reading
    keys = Keys(facts.sop_instance, facts.accession, facts.patient_id, facts.issuer)
    same: tuple[str, ...] = (keys.issuer, keys.patient_id, facts.pixels)
    if stacks:
        same += (facts.series, facts.position)
    if keys.sop_instance in instances or same in pixels:
        return Refused(short_id, Reject.DUPLICATE, keys)
    instances.add(keys.sop_instance)
    pixels.add(same)
    return Accepted(short_id, keys, facts.modality, facts.rows, facts.columns, image, facts.place)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A file under way; ``done`` is what is known of it already, else ``future`` will tell."""

    found: Item
    size: int = 0
    done: Reading | Reject | None = None
    future: Future[Reading] | None = None
    entry: str = ""


class _Reader:
    """Reads files ahead, as many as keep the workers busy, and gives them back in order."""

    def __init__(self, spec: Input, cache: ImageCache | None) -> None:
        self._spec = spec
        self._digest = spec_digest(spec)
        self._cache = cache
        self._pool = shared_pool()
        self._ahead: deque[_Waiting] = deque()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        # The caller may stop early, or be interrupted: what nobody waits for is not begun.
        for waiting in self._ahead:
            if waiting.future is not None:
                waiting.future.cancel()

    def read(self, found: Sequence[Item]) -> Iterator[tuple[Item, Reading | Reject]]:
        held = 0
        for one in found:
            self._ahead.append(waiting := self._begin(one))
            held += waiting.size
            while len(self._ahead) > 2 * self._pool.workers or held > _AHEAD_BYTES:
                held -= self._ahead[0].size
                yield self._end()
        while self._ahead:
            yield self._end()

    def _begin(self, one: Item) -> _Waiting:
        if one.reason is not None:
            return _Waiting(one, done=one.reason)
        try:
            data = one.read()
        except RejectedFile as rejected:
            return _Waiting(one, done=rejected.reason)
        entry = ""
        if self._cache is not None:
            entry = self._cache.name(hashlib.sha256(data).digest(), self._digest)
            known = self._cache.get(entry)
            facts = None if known is None else _facts(known[0])
            if known is not None and facts is not None:
                return _Waiting(one, done=(facts, known[1]))
        return _Waiting(one, len(data), future=self._pool.submit(data, self._spec), entry=entry)

    def _end(self) -> tuple[Item, Reading | Reject]:
        waiting = self._ahead[0]
        done = waiting.done
        if waiting.future is not None:
            try:
                done = waiting.future.result()
            except RejectedFile as rejected:
                done = rejected.reason
            else:
                if self._cache is not None:
                    self._cache.put(waiting.entry, dataclasses.asdict(done[0]), done[1])
        self._ahead.popleft()
        assert done is not None
        return waiting.found, done


def _facts(entry: Mapping[str, str | int]) -> Facts | None:
    """Read what the cache holds: written here, and sealed; None if before all was read."""
    if not entry.keys() >= {"pixels", *TEXTS}:
        return None
    texts = {name: str(entry[name]) for name in ("pixels", *TEXTS)}
    return Facts(rows=int(entry["rows"]), columns=int(entry["columns"]), **texts)


def short_id(key: bytes, name: bytes) -> str:
    """Name a file without its path: 12 hexadecimal digits, keyed."""
    return hmac.new(key, b"file\0" + name, hashlib.sha256).hexdigest()[:12]
