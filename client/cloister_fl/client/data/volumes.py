"""Volumes from slices: which belong together, in which order, and at which distances.

A series of CT or MR is a volume if its slices lie parallel, above each other and evenly apart.
One that does not is turned away whole, each of its slices counted under one reason; the other
series go on. The place of a slice along the stack is Image Position (Patient) times the normal,
the cross product of the direction cosines of row and column (PS3.3 C.7.6.2.1.1); neither names nor
instance numbers have a say.

Places are worked out in float64, one operation at a time, and rounded to nanometres; from there
on all arithmetic is in whole numbers. So a volume is the same to the bit on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.file_cache.image_cache import SealedImage
from cloister_fl.client.data.labels.row_matching import Linked
from cloister_fl.client.dicom.folder_reader import Accepted, record_of
from cloister_fl.client.dicom.geometry import numbers
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.stored_image import HeldImage, StoredImage
from cloister_fl.errors import Reject
from cloister_fl.study.schema import FEWEST_SLICES, Input

EVEN = 0.01
"""How far a distance between two slices may be from the median one, as a share of it."""

_UPRIGHT = 0.01
"""How far a stack may lean: sideways as a share of the way along. A gantry tilts by degrees."""
_SAME_PLACE = 0.01
"""Slices as near as this, in mm, are at one position."""
_COSINES = 1e-3
"""How far direction cosines may be off: rounding in the file, and no other plane."""
_PIXELS = 1e-3
"""How far pixel spacings may differ, as a share."""
_EQUAL = 1000
"""Where distances differ by less than one part in so many, nothing is resampled."""
_NANOMETRES = 1_000_000

_Vector: TypeAlias = tuple[float, float, float]
_Shades: TypeAlias = NDArray[np.uint16]


@dataclass(frozen=True)
class _Plane:
    """Where one slice lies, in mm."""

    position: _Vector
    row: _Vector
    column: _Vector
    pixels: tuple[float, float]
    stored: tuple[int, int]
    frame: str


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume and what it was made of.

    Attributes:
        slices: places in the list of slices, along the normal.
        image: where its shades are, (depth, size, size).
    """

    slices: tuple[int, ...]
    image: StoredImage


def assemble(
    slices: Sequence[Accepted], spec: Input, patients: Sequence[tuple[str, ...]] = ()
) -> tuple[list[Volume], dict[int, Reject]]:
    """Make a volume of each series that is one.

    Args:
        slices: accepted images, in any order.
        spec: the study's input, of three dimensions.
        patients: what stands for the patient of each; else issuer and number as they are.

    Returns:
        The volumes, by patient and series; and for each slice that is in none, the reason. A
        volume that a patient has twice is a ``DUPLICATE`` the second time.
    """
    series: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for index, one in enumerate(slices):
        patient = patients[index] if patients else record_of(one.keys)
        series.setdefault((patient, one.place.series), []).append(index)
    volumes: list[Volume] = []
    refused: dict[int, Reject] = {}
    seen: set[tuple[tuple[str, ...], bytes]] = set()
    for (patient, _), members in sorted(series.items()):
        try:
            volume = _volume(slices, members, spec)
            same = (patient, volume.image.digest)
            if same in seen:
                raise RejectedFile(Reject.DUPLICATE)
        except RejectedFile as rejected:
            refused |= dict.fromkeys(members, rejected.reason)
        else:
            seen.add(same)
            volumes.append(volume)
    return volumes, refused


def as_images(
    accepted: Sequence[tuple[Accepted, str]], linked: Sequence[Linked], spec: Input
) -> tuple[list[tuple[Accepted, str]], list[Linked], dict[int, Reject]]:
    """Put volumes in the place of slices.

    Args:
        accepted: slices, each with its patient.
        linked: what labels are joined to: one for each of ``accepted``, in its order, and between
            them one for each duplicate.
        spec: the study's input, of three dimensions.

    Returns:
        The volumes as images, each with its patient, under the keys of its first slice. What
        labels are joined to: the row of any slice counts for the patient, and none is missed but
        that of a whole volume. And for each slice that is in no volume, the reason.
    """
    volumes, refused = assemble(
        [one for one, _ in accepted], spec, [(name,) for _, name in accepted]
    )
    first = {volume.slices[0]: volume.image for volume in volumes}
    images = [
        (replace(accepted[index][0], image=image), accepted[index][1])
        for index, image in sorted(first.items())
    ]
    places = iter(range(len(accepted)))
    told = [
        one if one.duplicate or next(places) in first else replace(one, duplicate=True)
        for one in linked
    ]
    return images, told, refused


def _volume(slices: Sequence[Accepted], members: Sequence[int], spec: Input) -> Volume:
    if len(members) < FEWEST_SLICES:
        raise RejectedFile(Reject.VOLUME_INCOMPLETE)
    planes = [_plane(slices[index]) for index in members]
    # Of those that are alike the least, so that the order of files has no say.
    first = min(planes, key=lambda one: (one.row, one.column, one.position))
    if not all(_alike(one, first) for one in planes):
        raise RejectedFile(Reject.VOLUME_MIXED)
    normal = _unit(_cross(first.row, first.column))
    along = [_dot(one.position, normal) for one in planes]
    order = sorted(range(len(members)), key=lambda place: (along[place], planes[place].position))
    gaps = [along[b] - along[a] for a, b in pairwise(order)]
    if min(gaps) < _SAME_PLACE:
        raise RejectedFile(Reject.VOLUME_DOUBLED)
    lowest = planes[order[0]].position
    for place in order:
        way = _minus(planes[place].position, lowest)
        rise = _dot(way, normal)
        aside = _length(_minus(way, (rise * normal[0], rise * normal[1], rise * normal[2])))
        if aside > max(_UPRIGHT * rise, _SAME_PLACE):
            raise RejectedFile(Reject.VOLUME_TILTED)
    median = sorted(gaps)[len(gaps) // 2]
    if any(abs(gap - median) > EVEN * median for gap in gaps):
        raise RejectedFile(Reject.VOLUME_UNEVEN)
    assert spec.depth is not None
    assert spec.spacing is not None
    step = round((along[order[-1]] - along[order[0]]) / (len(order) - 1) * _NANOMETRES)
    sorted_slices = tuple(members[place] for place in order)
    parts = [slices[index].image for index in sorted_slices]
    spacing = round(spec.spacing * _NANOMETRES)
    return Volume(sorted_slices, _stacked(parts, step, spacing, spec.depth))


def _stacked(parts: Sequence[StoredImage], step: int, spacing: int, depth: int) -> StoredImage:
    """The volume of some slices; on disk, if they are there: one series is in memory at a time."""
    sealed = [one for one in parts if isinstance(one, SealedImage)]
    cache = sealed[0].cache if len(sealed) == len(parts) else None
    name = ""
    if cache is not None:
        how = f"{_rules()}\0{step}\0{spacing}\0{depth}".encode()
        name = cache.volume([one.name for one in sealed], how)
        known = cache.get(name)
        if known is not None:
            return cache.image(name, known[1].reshape(depth, *parts[0].shape))
    volume = resample([one.read() for one in parts], step, spacing, depth)
    if cache is not None and cache.put(name, {}, volume):
        return cache.image(name, volume)
    return HeldImage(volume)


@functools.cache
def _rules() -> str:
    """A digest of this module: a volume that other rules made is another."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def resample(slices: Sequence[_Shades], step: int, spacing: int, depth: int) -> _Shades:
    """Interpolate a stack linearly at other distances; crop or pad it around its middle.

    As many slices as fit between the first and the last are taken, centred. Where there are more
    than ``depth``, the outer ones are left out; where fewer, black ones (0) are put around. An odd
    one is left out at the end, and put at the start.

    Args:
        slices: uint16 (size, size) each, at least one.
        step: distance between two of them, in nanometres, above 0.
        spacing: the distance that is asked for, in nanometres.
        depth: slices of the result.

    Returns:
        uint16 (depth, size, size); each value rounded to the nearest, halves up.
    """
    if abs(step - spacing) * _EQUAL < spacing:
        step = spacing
    extent = (len(slices) - 1) * step
    # A stack that rounding in the file made a little short still has its last slice.
    count = (extent + spacing // _EQUAL) // spacing + 1
    margin = (extent - (count - 1) * spacing) // 2
    start = (count - depth) // 2
    volume = np.zeros((depth, *slices[0].shape), dtype=np.uint16)
    for place in range(depth):
        if not 0 <= start + place < count:
            continue
        where = min(max(margin + (start + place) * spacing, 0), extent)
        below, rest = divmod(where, step)
        if not rest:
            volume[place] = slices[below]
            continue
        low, high = (slices[below + one].astype(np.int64) for one in (0, 1))
        volume[place] = (low * (step - rest) + high * rest + step // 2) // step
    return volume


def _plane(one: Accepted) -> _Plane:
    """Read where a slice lies; ``VOLUME_UNPLACED`` where that is not told, or makes no sense."""
    place = one.place
    position = numbers(place.position, 3)
    cosines = numbers(place.orientation, 6)
    pixels = numbers(place.pixel_spacing, 2)
    if not (place.series and position and cosines and pixels and min(pixels) > 0):
        raise RejectedFile(Reject.VOLUME_UNPLACED)
    row, column = _vector(cosines[:3]), _vector(cosines[3:])
    unit = abs(_length(row) - 1) <= _COSINES and abs(_length(column) - 1) <= _COSINES
    if not unit or abs(_dot(row, column)) > _COSINES:
        raise RejectedFile(Reject.VOLUME_UNPLACED)
    stored = (one.facts.rows, one.facts.columns)
    return _Plane(_vector(position), row, column, (pixels[0], pixels[1]), stored, place.frame)


def _alike(one: _Plane, other: _Plane) -> bool:
    """Whether two slices have one orientation, one grid of pixels and one frame of reference."""
    cosines = zip((*one.row, *one.column), (*other.row, *other.column), strict=True)
    return (
        all(abs(a - b) <= _COSINES for a, b in cosines)
        and all(abs(a - b) <= _PIXELS * b for a, b in zip(one.pixels, other.pixels, strict=True))
        and one.stored == other.stored
        and one.frame == other.frame
    )


def _vector(values: Sequence[float]) -> _Vector:
    return values[0], values[1], values[2]


# One operation at a time, in this order: a library's product may round otherwise elsewhere.


def _dot(a: _Vector, b: _Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _minus(a: _Vector, b: _Vector) -> _Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _cross(a: _Vector, b: _Vector) -> _Vector:
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


def _length(a: _Vector) -> float:
    return math.sqrt(_dot(a, a))


def _unit(a: _Vector) -> _Vector:
    length = _length(a)
    return a[0] / length, a[1] / length, a[2] / length
