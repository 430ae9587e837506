"""What a network's fixed part made of a cohort's images: computed once, kept sealed on disk.

Features of single images lie in the site's cache, each under a name that says of which shades, by
which weights, and on which kind of device with which version of torch; so another of these finds
nothing here. One that was cut short, changed or moved does not bear its seal, and is computed anew.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.file_cache.image_cache import Cache

MOST_BYTES = 1 << 30
"""Most that is kept in memory beyond the cohorts in use; the least recently used goes first."""

_SIDES = 8
"""Bytes of each side of a row, on disk."""


class Rows:
    """Features of single images, for cohorts that are read again or divided otherwise.

    Args:
        most_bytes: most that is kept in memory; the least recently used goes first.
        disk: where all are kept; None for in memory alone.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, disk: Cache | None = None) -> None:
        self._most = most_bytes
        self._disk = disk
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The features of an image, by the hash of its pixels and of what computed them."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
            return row
        plain = None if self._disk is None else self._disk.read(self._disk.feature(key))
        if plain is None:
            return None
        row = _row(plain)
        self._hold(key, row)
        return row

    def keep(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Keep the features of an image: for good, if the disk has room."""
        if self._disk is not None:
            sides = b"".join(side.to_bytes(_SIDES, "big") for side in (row.ndim, *row.shape))
            self._disk.write(self._disk.feature(key), sides + row.astype("<f4").tobytes())
        self._hold(key, row)

    def _hold(self, key: bytes, row: NDArray[np.float32]) -> None:
        self._rows[key] = row
        while len(self._rows) * row.nbytes > self._most:
            self._rows.popitem(last=False)


def _row(plain: bytes) -> NDArray[np.float32]:
    """What is authentic was written by ``keep``, so its form needs no further check."""
    sides = [
        int.from_bytes(plain[at : at + _SIDES], "big")
        for at in range(0, _SIDES * (1 + int.from_bytes(plain[:_SIDES], "big")), _SIDES)
    ]
    row = np.frombuffer(plain, "<f4", offset=_SIDES * len(sides)).astype(np.float32)
    return row.reshape(sides[1:])


@dataclass(eq=False)
class Features:
    """Features of one cohort; they live as long as it does.

    Attributes:
        rows: of single images; parts of a cohort share them.
        whole: of all its images, by what computed them.
    """

    rows: Rows = field(default_factory=Rows)
    whole: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def part(self) -> Features:
        """For a cohort that is part of this one."""
        return Features(self.rows)
