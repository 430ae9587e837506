"""Geometry of a slice in the patient: the header's values, and how they travel as text.

An image of which this is unknown is still an image; only a volume needs it (``volumes``). So what
is missing or no sound number is empty here, and no reason to turn the file away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

PLACED = frozenset(("CT", "MR"))
"""The modalities whose slices are placed."""

_UID = re.compile(r"([0-9.]{1,64})?")  # PS3.5 section 9.1
_NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,24})?(e-[0-9]{1,3})?")
_FAR = 1e5
"""No number of a sound header is as large, in mm: a hundred metres."""


@dataclass(frozen=True)
class Place:
    """The elements of the Image Plane and Frame of Reference modules, empty where unknown.

    Attributes:
        series: Series Instance UID.
        frame: Frame of Reference UID (PS3.3 C.7.4.1).
        position: Image Position (Patient), 3 numbers in mm (PS3.3 C.7.6.2).
        orientation: Image Orientation (Patient), 6 direction cosines: of a row, of a column.
        pixel_spacing: Pixel Spacing, 2 numbers in mm: between rows, between columns.
    """

    series: str = ""
    frame: str = ""
    position: str = ""
    orientation: str = ""
    pixel_spacing: str = ""

    @property
    def sound(self) -> bool:
        """Whether each text is empty or of its form."""
        return bool(
            _UID.fullmatch(self.series)
            and _UID.fullmatch(self.frame)
            and all(
                not text or numbers(text, count)
                for text, count in (
                    (self.position, 3),
                    (self.orientation, 6),
                    (self.pixel_spacing, 2),
                )
            )
        )


def uid(text: str) -> str:
    """The text, if it is a UID; else nothing."""
    return text if _UID.fullmatch(text) else ""


def text_of(values: Sequence[float], count: int) -> str:
    """Write ``count`` numbers so that they come back to the bit; nothing, where they are none."""
    if len(values) != count or not all(math.isfinite(one) and abs(one) < _FAR for one in values):
        return ""
    # A negative zero is another text, and no other place.
    return "\\".join(repr(float(one) + 0.0) for one in values)


def numbers(text: str, count: int) -> tuple[float, ...]:
    """Read what ``text_of`` wrote; empty for anything else."""
    parts = text.split("\\")
    if len(parts) != count or not all(_NUMBER.fullmatch(part) for part in parts):
        return ()
    values = tuple(float(part) for part in parts)
    return values if all(abs(one) < _FAR for one in values) else ()
