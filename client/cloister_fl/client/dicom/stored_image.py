"""Where the shades of one image are: in memory, or where they are read from each time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StoredImage(Protocol):
    """An image whose shades can be had, again and again."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(size, size); of a volume (depth, size, size)."""
        ...

    @property
    def digest(self) -> bytes:
        """SHA-256 of the shades, row by row, little endian."""
        ...

    def read(self) -> NDArray[np.uint16]:
        """The shades of grey, 0 (black) to 65535."""
        ...


@dataclass(frozen=True, eq=False)
class HeldImage:
    """An image in memory."""

    shades: NDArray[np.uint16] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shades.shape

    @cached_property
    def digest(self) -> bytes:
        return digest_of(self.shades)

    def read(self) -> NDArray[np.uint16]:
        return self.shades


def digest_of(shades: NDArray[np.uint16]) -> bytes:
    """See ``StoredImage.digest``."""
    return hashlib.sha256(np.ascontiguousarray(shades, dtype="<u2").data).digest()
