"""Read-ahead of files through the workers: remembered, and returned in order.

What was read once is looked up (``Memory``), under a digest of the very code that read it: what
an earlier version took or turned away says nothing about this one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.facts import SHARED, TEXTS, Facts
from cloister_fl.client.dicom.pixels.preprocessing_digest import spec_digest
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Reading, shared_pool
from cloister_fl.client.dicom.stored_image import StoredImage
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Input

_AHEAD_BYTES = 128 << 20
"""Most bytes of files that are read ahead, the one file at hand apart."""


class Item(Protocol):
    """Where the bytes of one file come from; see ``file_finder.Found``."""

    @property
    def name(self) -> bytes: ...

    @property
    def reason(self) -> Reject | None: ...

    def read(self) -> bytes: ...

    def stamp(self) -> str: ...


class ImageCache(Protocol):
    """What ``read_folder`` needs of a cache; see ``client.data.file_cache.image_cache``."""

    damaged: int

    def content(self, data: bytes) -> bytes: ...

    def name(self, content: bytes, spec: str, *, released: bool = False) -> str: ...

    def get(self, name: str) -> tuple[dict[str, str | int], NDArray[np.uint16]] | None: ...

    def put(self, name: str, facts: Mapping[str, str | int], image: NDArray[np.uint16]) -> bool: ...

    def image(self, name: str, shades: NDArray[np.uint16]) -> StoredImage: ...


class FileIndex(Protocol):
    """What ``read_folder`` needs of an index; see ``client.data.file_cache.file_index``."""

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


@dataclass(frozen=True, eq=False)
class Waiting:
    """A file under way; ``done`` is what is known of it already, else ``future`` will tell.

    ``entry`` is what the cache calls it; once it is done, empty where it is not there.
    """

    found: Item
    size: int = 0
    done: Reading | Reject | None = None
    future: Future[Reading] | None = None
    content: bytes = b""
    entry: str = ""
    damaged: bool = False


class Reader:
    """Reads files ahead, as many as keep the workers busy, and gives them back in order.

    Args:
        spec: the study's input.
        memory: see ``read_folder``, as are ``segment`` and ``alone``.
    """

    def __init__(
        self, spec: Input, memory: Memory | None, segment: str, *, alone: bool = False
    ) -> None:
        self._spec = spec
        self._alone = alone
        self._segment = segment
        self._digest = hashlib.sha256((_rules() + spec_digest(spec, segment)).encode()).hexdigest()
        self._memory = memory
        self._pool = shared_pool(segmentations=bool(segment))
        self._ahead: deque[Waiting] = deque()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        # The caller may stop early, or be interrupted: what nobody waits for is not begun.
        for waiting in self._ahead:
            if waiting.future is not None:
                waiting.future.cancel()

    def read(
        self, found: Sequence[Item], *, ahead: int | None = None
    ) -> Iterator[tuple[Waiting, Reading | Reject]]:
        """Read files in this order; ``ahead`` is how many are begun before one is asked for."""
        held = 0
        most = 2 * self._pool.workers if ahead is None else ahead
        for one in found:
            self._ahead.append(waiting := self._begin(one))
            held += waiting.size
            while len(self._ahead) > most or held > _AHEAD_BYTES:
                held -= self._ahead[0].size
                yield self._end()
        while self._ahead:
            yield self._end()

    def _begin(self, one: Item) -> Waiting:
        if one.reason is not None:
            return Waiting(one, done=one.reason)
        try:
            if self._memory is None:
                data = one.read()
                return Waiting(one, len(data), future=self._submitted(data, released=False))
            return self._remembered(one, self._memory)
        except RejectedFile as rejected:
            return Waiting(one, done=rejected.reason)
        except Exception:
            if not self._alone:
                raise
            return Waiting(one, done=Reject.UNREADABLE)

    def _remembered(self, one: Item, memory: Memory) -> Waiting:
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
        return Waiting(
            one,
            len(data),
            future=self._submitted(data, released=released),
            content=content,
            entry=memory.cache.name(content, self._digest, released=released),
            damaged=memory.cache.damaged > damaged,
        )

    def _submitted(self, data: bytes, *, released: bool) -> Future[Reading]:
        return self._pool.submit(data, self._spec, released=released, segment=self._segment)

    def _known(self, one: Item, content: bytes, memory: Memory) -> Waiting | None:
        released = content in memory.releases
        reason = memory.index.reason(content, self._digest)
        if reason is not None and not (released and reason.held):
            return Waiting(one, done=reason, content=content)
        entry = memory.cache.name(content, self._digest, released=released)
        found = memory.cache.get(entry)
        facts = None if found is None else _facts(found[0])
        if found is None or facts is None:
            return None
        return Waiting(one, done=(facts, found[1]), content=content, entry=entry)

    def _end(self) -> tuple[Waiting, Reading | Reject]:
        waiting = self._ahead[0]
        done = waiting.done
        if waiting.future is not None:
            try:
                done = waiting.future.result()
            except RejectedFile as rejected:
                done = rejected.reason
            except Exception:
                if not self._alone:
                    raise
                # Such as a decoder that only this file asks for, and that fails its self-test.
                done = Reject.DECODE_FAILED
            if self._memory is not None and isinstance(done, Reject):
                self._memory.index.turned_away(waiting.content, self._digest, done)
            elif self._memory is not None:
                assert done is not None
                assert not isinstance(done, Reject)
                if not self._memory.cache.put(waiting.entry, dataclasses.asdict(done[0]), done[1]):
                    waiting = dataclasses.replace(waiting, entry="")
        self._ahead.popleft()
        assert done is not None
        return waiting, done


def _facts(entry: Mapping[str, str | int]) -> Facts | None:
    """Read what the cache holds: written here, and sealed; None if before all was read."""
    if not entry.keys() >= {"pixels", *TEXTS}:
        return None
    texts = {name: str(entry[name]) for name in ("pixels", *TEXTS)}
    # One of each in memory, of what many images share.
    texts |= {name: sys.intern(texts[name]) for name in SHARED}
    return Facts(rows=int(entry["rows"]), columns=int(entry["columns"]), **texts)


@functools.cache
def _rules() -> str:
    """A digest of the code that reads files: what it said of them holds for it alone."""
    told = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        name = path.relative_to(here).as_posix()
        told.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return told.hexdigest()
