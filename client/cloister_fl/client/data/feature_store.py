"""What was computed of a cohort's images, kept with the cohort; no disk sees it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 1 << 30
"""Most that is kept beyond the cohorts in use; the least recently used goes first."""


class Rows:
    """Features of single images, for cohorts that are read again or divided otherwise.

    Args:
        most_bytes: most that is kept; the least recently used goes first.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The features of an image, by the hash of its pixels and of what computed them."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def keep(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Keep the features of an image, in place of others where there are too many."""
        self._rows[key] = row
        while len(self._rows) * row.nbytes > self._most:
            self._rows.popitem(last=False)


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
