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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_client.dicom.discover import discover
from cloister_client.dicom.geometry import Place
from cloister_client.dicom.outlines import MODALITY, Outlines
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

    damaged: int

    def content(self, data: bytes) -> bytes: ...

    def name(self, content: bytes, spec: str, *, released: bool = False) -> str: ...

    def get(self, name: str) -> tuple[dict[str, str | int], NDArray[np.uint16]] | None: ...

    def put(self, name: str, facts: Mapping[str, str | int], image: NDArray[np.uint16]) -> None: ...


class FileIndex(Protocol):
    """What ``read_folder`` needs of an index; see ``cloister_client.index``."""

    def content(self, name: bytes, stamp: str) -> bytes | None: ...

    def saw(self, name: bytes, stamp: str, content: bytes) -> None: ...

    def reason(self, content: bytes, spec: str) -> Reject | None: ...

    def turned_away(self, content: bytes, spec: str, reason: Reject) -> None: ...


@dataclass(frozen=True, eq=False)
class Memory:
    """What a site remembers of its files.

    Attributes:
        cache: preprocessed images.
        index: which file has which content; a file that did not change is not opened.
        releases: contents of held files that a person has released.
    """

    cache: ImageCache
    index: FileIndex
    releases: Collection[bytes] = frozenset()


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
        facts: all else that is known of it; the identifiers are not in its ``repr``.
        image: shades of grey, uint16, shape (size, size); a volume has (depth, size, size).
        content: keyed hash of the file's content, 32 bytes; empty without a memory.
        damaged: whether what the cache held of it did not bear its seal. It was decoded anew.
    """

    short_id: str
    keys: Keys
    facts: Facts
    image: NDArray[np.uint16] = field(repr=False)
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
        short_id, keys, facts, damaged: see ``Accepted``; rows and columns are the images'.
        outlines: what it marks.
    """

    short_id: str
    keys: Keys
    facts: Facts
    outlines: Outlines = field(repr=False)
    damaged: bool = False


@dataclass(frozen=True)
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
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Accepted | Segmented | Refused]:
    """Yield the outcome of each file, in the order of the paths.

    Args:
        dicom: the folder.
        spec: the study's input.
        key: keys the short names of files; the site's pseudonym key, or any secret.
        memory: what is known from before, and takes up what is new; or None.
        also: files from elsewhere, read after those of the folder.
        segment: what is outlined in the segmentations of the folder; empty to turn them away.
        first: contents, as ``memory`` names them, that come before all others: of two files of one
            image the first is used.
        progress: called with (files done, files in all) after each file.

    Raises:
        FolderUnreadable: the folder cannot be listed.
        DecoderUnfit: a decoder fails its known-answer test, or no worker can be started.
    """
    found: tuple[Item, ...] = (*discover(dicom), *also)
    instances: set[str] = set()
    pixels: set[tuple[str, ...]] = set()
    stacks = spec.dimensions == 3

    def judged(waiting: _Waiting, reading: Reading | Reject) -> Accepted | Segmented | Refused:
        name = short_id(key, waiting.found.name)
        if not isinstance(reading, Reject) and reading[0].modality == MODALITY:
            return _segmented(name, waiting, reading, instances, spec.size)
        return _judge(name, waiting, reading, instances, pixels, stacks)

    later: list[tuple[_Waiting, Reading | Reject]] = []
    with _Reader(spec, memory, segment) as reader:
        for done, (waiting, reading) in enumerate(reader.read(found), start=1):
            if progress is not None:
                progress(done, len(found))
            if first and waiting.content not in first:
                later.append((waiting, reading))
            else:
                yield judged(waiting, reading)
    for waiting, reading in later:
        yield judged(waiting, reading)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A file under way; ``done`` is what is known of it already, else ``future`` will tell."""

    found: Item
    size: int = 0
    done: Reading | Reject | None = None
    future: Future[Reading] | None = None
    content: bytes = b""
    entry: str = ""
    damaged: bool = False


def _judge(
    name: str,
    waiting: _Waiting,
    reading: Reading | Reject,
    instances: set[str],
    pixels: set[tuple[str, ...]],
    stacks: bool,
) -> Accepted | Refused:
    """Turn away what was there before; ``instances`` and ``pixels`` remember it.

    In a stack of slices (``stacks``) two may look alike, such as air; not at one position.
    """
    if isinstance(reading, Reject):
        return Refused(name, reading, content=waiting.content)
    facts, image = reading
    keys = _keys(facts)
    same: tuple[str, ...] = (keys.issuer, keys.patient_id, facts.pixels)
    if stacks:
        same += (facts.series, facts.position)
    if keys.sop_instance in instances or same in pixels:
        return Refused(name, Reject.DUPLICATE, keys, content=waiting.content)
    instances.add(keys.sop_instance)
    pixels.add(same)
    return Accepted(name, keys, facts, image, waiting.content, waiting.damaged)


def _segmented(
    name: str, waiting: _Waiting, reading: Reading, instances: set[str], size: int
) -> Segmented | Refused:
    """Turn away a copy of one that was there before."""
    facts, table = reading
    if facts.sop_instance in instances:
        return Refused(name, Reject.DUPLICATE, content=waiting.content)
    instances.add(facts.sop_instance)
    return Segmented(name, _keys(facts), facts, Outlines(table, size), waiting.damaged)


def _keys(facts: Facts) -> Keys:
    return Keys(facts.sop_instance, facts.accession, facts.patient_id, facts.issuer)


class _Reader:
    """Reads files ahead, as many as keep the workers busy, and gives them back in order."""

    def __init__(self, spec: Input, memory: Memory | None, segment: str) -> None:
        self._spec = spec
        self._segment = segment
        self._digest = spec_digest(spec, segment)
        self._memory = memory
        self._pool = shared_pool(segmentations=bool(segment))
        self._ahead: deque[_Waiting] = deque()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        # The caller may stop early, or be interrupted: what nobody waits for is not begun.
        for waiting in self._ahead:
            if waiting.future is not None:
                waiting.future.cancel()

    def read(self, found: Sequence[Item]) -> Iterator[tuple[_Waiting, Reading | Reject]]:
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
            if self._memory is None:
                data = one.read()
                return _Waiting(one, len(data), future=self._submitted(data, released=False))
            return self._remembered(one, self._memory)
        except RejectedFile as rejected:
            return _Waiting(one, done=rejected.reason)

    def _remembered(self, one: Item, memory: Memory) -> _Waiting:
        """Begin with what is known of the file; it is opened only where that is not enough."""
        damaged = memory.cache.damaged
        stamp = one.stamp()
        content = memory.index.content(one.name, stamp) if stamp else None
        if content is not None:
            known = self._known(one, content, memory)
            if known is not None:
                return known
        data = one.read()
        content = memory.cache.content(data)
        if stamp:
            memory.index.saw(one.name, stamp, content)
        known = self._known(one, content, memory)
        if known is not None:
            return known
        released = content in memory.releases
        return _Waiting(
            one,
            len(data),
            future=self._submitted(data, released=released),
            content=content,
            entry=memory.cache.name(content, self._digest, released=released),
            damaged=memory.cache.damaged > damaged,
        )

    def _submitted(self, data: bytes, *, released: bool) -> Future[Reading]:
        return self._pool.submit(data, self._spec, released=released, segment=self._segment)

    def _known(self, one: Item, content: bytes, memory: Memory) -> _Waiting | None:
        released = content in memory.releases
        reason = memory.index.reason(content, self._digest)
        if reason is not None and not (released and reason.held):
            return _Waiting(one, done=reason, content=content)
        found = memory.cache.get(memory.cache.name(content, self._digest, released=released))
        facts = None if found is None else _facts(found[0])
        if found is None or facts is None:
            return None
        return _Waiting(one, done=(facts, found[1]), content=content)

    def _end(self) -> tuple[_Waiting, Reading | Reject]:
        waiting = self._ahead[0]
        done = waiting.done
        if waiting.future is not None:
            try:
                done = waiting.future.result()
            except RejectedFile as rejected:
                done = rejected.reason
            if self._memory is not None and isinstance(done, Reject):
                self._memory.index.turned_away(waiting.content, self._digest, done)
            elif self._memory is not None:
                assert done is not None
                assert not isinstance(done, Reject)
                self._memory.cache.put(waiting.entry, dataclasses.asdict(done[0]), done[1])
        self._ahead.popleft()
        assert done is not None
        return waiting, done


def _facts(entry: Mapping[str, str | int]) -> Facts | None:
    """Read what the cache holds: written here, and sealed; None if before all was read."""
    if not entry.keys() >= {"pixels", *TEXTS}:
        return None
    texts = {name: str(entry[name]) for name in ("pixels", *TEXTS)}
    return Facts(rows=int(entry["rows"]), columns=int(entry["columns"]), **texts)


def short_id(key: bytes, name: bytes) -> str:
    """Name a file without its path: 12 hexadecimal digits, keyed."""
    return hmac.new(key, b"file\0" + name, hashlib.sha256).hexdigest()[:12]
