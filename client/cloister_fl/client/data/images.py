"""The images of a cohort: an index in arrays; the shades stay sealed on disk until a step asks.

An array of NumPy offers the same, for a cohort that is small or made up. What is read is
authenticated by its seal each time and held against the hash that it was taken into the cohort
with, so an entry that was changed, replaced or removed since is found before anything sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.file_cache.image_cache import Cache, SealedImage
from cloister_fl.client.dicom.stored_image import StoredImage, digest_of
from cloister_fl.errors import DataError

Shades: TypeAlias = NDArray[np.uint16]


HELD_BYTES = 32 << 20
"""Most bytes of a cohort that is held in memory as a whole: some hundred radiographs."""


@dataclass(frozen=True, eq=False)
class SealedImages:
    """Images in a site's cache.

    Attributes:
        cache: where they lie.
        entries: (N, 32) bytes, their names there; zeros where ``held`` has the image.
        digests: (N, 32) bytes, see ``StoredImage.digest``.
        each: the shape of one.
        held: images that the cache did not take, such as where the disk was full.
    """

    cache: Cache
    entries: NDArray[np.uint8] = field(repr=False)
    digests: NDArray[np.uint8] = field(repr=False)
    each: tuple[int, ...]
    held: Mapping[int, Shades] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array would have it."""
        return len(self.entries), *self.each

    @property
    def ndim(self) -> int:
        """As an array would have it."""
        return 1 + len(self.each)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int | Sequence[int] | NDArray[np.int64]) -> Shades:
        """Read one image, or those at some places, in their order.

        Raises:
            IndexError: there is no such place.
            DataChanged: an image is not what it was.
        """
        if isinstance(place, int | np.integer):
            return self._read(int(place))
        found = np.empty((len(place), *self.each), np.uint16)
        for row, one in enumerate(place):
            found[row] = self._read(int(one))
        return found

    def __iter__(self) -> Iterator[Shades]:
        return map(self._read, range(len(self)))

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.uint16]:
        """All of them in memory: for a few."""
        del dtype, copy
        return self[np.arange(len(self))]

    def part(self, places: NDArray[np.int64]) -> SealedImages:
        """Those at some places, in their order."""
        moved = {old: new for new, old in enumerate(map(int, places))}
        held = {moved[old]: one for old, one in self.held.items() if old in moved}
        return replace(self, entries=self.entries[places], digests=self.digests[places], held=held)

    def _read(self, place: int) -> Shades:
        if not 0 <= place < len(self):
            raise IndexError("no such image")
        kept = self.held.get(place)
        if kept is not None:
            return kept
        name, digest = self.entries[place].tobytes(), self.digests[place].tobytes()
        return SealedImage(self.cache, name, digest, self.each).read()


Images: TypeAlias = NDArray[np.uint16] | SealedImages
"""Images by their places, 0 to N - 1: (N, S, S), of volumes (N, D, S, S)."""


def gathered(images: Sequence[StoredImage]) -> Images:
    """Images of one shape as those of a cohort, at least one: few of them held in memory, many
    sealed where they are."""
    sealed = next((one for one in images if isinstance(one, SealedImage)), None)
    if sealed is None or len(images) * math.prod(sealed.shape) * 2 <= HELD_BYTES:
        # One that is gone meanwhile costs its patient later, and not everybody now.
        with suppress(DataError):
            return np.stack([one.read() for one in images])
    assert sealed is not None
    nowhere = bytes(32)
    names = [one.name if isinstance(one, SealedImage) else nowhere for one in images]
    return SealedImages(
        sealed.cache,
        np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32),
        np.frombuffer(b"".join(one.digest for one in images), np.uint8).reshape(-1, 32),
        sealed.shape,
        {at: one.read() for at, one in enumerate(images) if not isinstance(one, SealedImage)},
    )


def cache_of(images: Sequence[StoredImage]) -> Cache | None:
    """The cache in which images lie; None where none does."""
    return next((one.cache for one in images if isinstance(one, SealedImage)), None)


def part_of(images: Images, places: NDArray[np.int64]) -> Images:
    """Those at some places, in their order; what is on disk stays there."""
    return images.part(places) if isinstance(images, SealedImages) else images[places]


def digest_at(images: Images, place: int) -> bytes:
    """SHA-256 of an image's shades; nothing is read of a sealed one."""
    if isinstance(images, SealedImages):
        return bytes(images.digests[place])
    shades: Shades = images[place]
    return digest_of(shades)


def are_same(some: Images, others: Images) -> bool:
    """Whether they are the same images, in the same order."""
    if some.shape != others.shape:
        return False
    if isinstance(some, SealedImages) and isinstance(others, SealedImages):
        return np.array_equal(some.digests, others.digests)
    return all(digest_at(some, place) == digest_at(others, place) for place in range(len(some)))
