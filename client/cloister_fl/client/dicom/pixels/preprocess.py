"""Preprocessing of stored values to tensor pixels; a pure function of image and study input.

Every step up to the resize maps one stored value to one shade, so it is worked out once for each
of the at most 65,536 values, in float64, and looked up for the pixels. The resize adds whole
numbers, so the result is the same to the bit on every machine and with any number of
threads.

Order of the steps: padding is set apart; modality LUT or rescale (PS3.3 C.11.1); VOI LUT, window
or percentiles (C.11.2), scaled to [0, 1]; MONOCHROME1 is turned over; padding becomes black; area
resize.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.errors import Reject

if TYPE_CHECKING:
    # The process with the data has no use for pydicom, nor a worker for pydantic.
    from cloister_fl.client.dicom.header import Grayscale, Lut, PixelLayout


WHITE = 65535

_PART = 1 << 17
"""Pixels that are looked up at a time, so that numpy's wider copies of them stay small."""

Shades = NDArray[np.uint16]
_Values = NDArray[np.float64]


class Recipe(Protocol):
    """What ``preprocess`` needs of a study's input; see ``cloister_fl.study.schema.Input``."""

    @property
    def size(self) -> int: ...

    @property
    def windowing(self) -> str: ...

    @property
    def percentiles(self) -> tuple[float, float]: ...

    @property
    def window(self) -> tuple[float, float] | None: ...


def preprocess(
    stored: NDArray[np.int32], layout: PixelLayout, grayscale: Grayscale, spec: Recipe
) -> Shades:
    """Turn stored values into the image that is trained on.

    Args:
        stored: stored values, shape (rows, columns), within ``layout``'s bits.
        layout: bits and sign of the stored values.
        grayscale: what the header says of their meaning.
        spec: the study's input.

    Returns:
        Shades from 0 (black) to 65535 (white), shape (size, size). An image of one value, for
        which no window can be told, is mid-grey.

    Raises:
        RejectedFile: ``PIXEL_FORMAT`` where there is nothing but padding, or where the study asks
            for the image's own VOI transform and it has none.
    """
    low = -(1 << (layout.bits_stored - 1)) if layout.signed else 0
    inputs = np.arange(low, low + (1 << layout.bits_stored), dtype=np.int64)
    pixels = stored.ravel()
    counts = np.zeros(inputs.size, dtype=np.int64)
    for start in range(0, pixels.size, _PART):
        counts += np.bincount(pixels[start : start + _PART] - low, minlength=inputs.size)
    padding = np.zeros(inputs.size, dtype=bool)
    if grayscale.padding is not None:
        first, last = grayscale.padding
        padding = (inputs >= first) & (inputs <= last)
    counts[padding] = 0
    if not counts.any():
        raise RejectedFile(Reject.PIXEL_FORMAT)
    values = modality_values(inputs, grayscale)
    shades = _quantise(_display(values, counts, grayscale, spec))
    shades[padding] = 0
    image = np.empty(stored.shape, dtype=np.uint16)
    flat = image.ravel()
    for start in range(0, pixels.size, _PART):
        part = pixels[start : start + _PART] - low
        # No index is outside; "clip" spares the copy that the test for one would make.
        np.take(shades, part, out=flat[start : start + _PART], mode="clip")
    return area_resize(image, spec.size)


def modality_values(inputs: NDArray[np.int64], grayscale: Grayscale) -> _Values:
    """Apply the modality LUT or the rescale to stored values (PS3.3 C.11.1)."""
    if grayscale.modality_lut is not None:
        return _look_up(grayscale.modality_lut, inputs.astype(np.float64))
    return inputs.astype(np.float64) * grayscale.slope + grayscale.intercept


def window_linear(values: _Values, centre: float, width: float) -> _Values:
    """LINEAR (PS3.3 C.11.2.1.2.1), scaled to [0, 1]; ``width`` is at least 1."""
    if width == 1:
        return np.where(values <= centre - 0.5, 0.0, 1.0)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def window_linear_exact(values: _Values, centre: float, width: float) -> _Values:
    """LINEAR_EXACT (PS3.3 C.11.2.1.3.2), scaled to [0, 1]; ``width`` is above 0."""
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def window_sigmoid(values: _Values, centre: float, width: float) -> _Values:
    """SIGMOID (PS3.3 C.11.2.1.3.1), in [0, 1]; ``width`` is above 0."""
    # Beyond 700 the exponential leaves float64, long after the sigmoid has reached its end.
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))


def area_resize(image: Shades, size: int) -> Shades:
    """Average over the area that each pixel of the result covers, rounding halves up.

    A pixel of the result covers ``rows / size`` by ``columns / size`` pixels of the image. In
    units of ``1 / size`` all overlaps are whole numbers, and so are all sums: at most
    65535 x 2**26 x 2**10, far below 2**63, so int64 adds them without error in any order, and the
    result is the same on every machine.

    Args:
        image: shape (rows, columns), at most 2**26 pixels.
        size: side of the result, at most 1024.

    Returns:
        Shape (size, size).
    """
    rows, columns = image.shape
    total = _box_sums(np.ascontiguousarray(_box_sums(image, size).T), size).T
    area = rows * columns
    mean: Shades = ((total + area // 2) // area).astype(np.uint16)
    return mean


def _box_sums(image: NDArray[Any], size: int) -> NDArray[np.int64]:
    """Sum along the rows over ``size`` equal boxes, in units of ``1 / size`` row.

    Shape (rows, columns) gives (size, columns). Row by row, so that the rows of a box are added
    while they are in the processor's cache; by running sums it takes twenty times as long.
    """
    rows = image.shape[0]
    edges = np.arange(size + 1, dtype=np.int64) * rows
    whole, part = edges // size, edges % size
    # Shades of at most 65,535 rows, as a header can tell them, stay below 2**32.
    wide = np.uint32 if image.dtype == np.uint16 else np.int64
    sums = np.zeros((size, image.shape[1]), dtype=wide)
    for box in range(size):
        np.add.reduce(image[whole[box] : whole[box + 1]], axis=0, dtype=wide, out=sums[box])
    # The last edge has no part, so the row behind the image is never used.
    at_edges = image[np.minimum(whole, rows - 1)].astype(np.int64) * part[:, None]
    total: NDArray[np.int64] = sums.astype(np.int64) * size + np.diff(at_edges, axis=0)
    return total


def _display(
    values: _Values, counts: NDArray[np.int64], grayscale: Grayscale, spec: Recipe
) -> _Values:
    """Map modality values to [0, 1], black to white."""
    shown: _Values | None = None
    if spec.windowing == "fixed" and spec.window is not None:
        shown = window_linear_exact(values, *spec.window)
    elif spec.windowing in ("auto", "voi"):
        shown = _own_voi(values, grayscale)
        if shown is None and spec.windowing == "voi":
            raise RejectedFile(Reject.PIXEL_FORMAT)
    if shown is not None:
        return 1.0 - shown if grayscale.inverted else shown
    # Percentiles are told from dark to bright, so a MONOCHROME1 image is turned over first;
    # else uneven percentiles would cut the other end of it.
    return _between_percentiles(-values if grayscale.inverted else values, counts, spec.percentiles)


def _own_voi(values: _Values, grayscale: Grayscale) -> _Values | None:
    """Apply the image's first VOI transform; None where it has none that can be used."""
    if grayscale.voi_lut is not None:
        lut = grayscale.voi_lut
        return np.clip(_look_up(lut, values) / ((1 << lut.bits) - 1), 0.0, 1.0)
    if grayscale.window is None:
        return None
    centre, width = grayscale.window
    if grayscale.function == "LINEAR" and width >= 1:
        return window_linear(values, centre, width)
    if grayscale.function == "LINEAR_EXACT" and width > 0:
        return window_linear_exact(values, centre, width)
    if grayscale.function == "SIGMOID" and width > 0:
        return window_sigmoid(values, centre, width)
    return None


def _between_percentiles(
    values: _Values, counts: NDArray[np.int64], percentiles: tuple[float, float]
) -> _Values:
    """Stretch from one percentile of the pixels to another, each a value that occurs."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(counts[order])
    total = int(upto[-1])
    low, high = (
        float(values[order[int(np.searchsorted(upto, max(1, math.ceil(p / 100 * total))))]])
        for p in percentiles
    )
    if high <= low:
        occurring = values[counts > 0]
        low, high = float(occurring.min()), float(occurring.max())
    if high <= low:
        return np.full(values.shape, 0.5)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _look_up(lut: Lut, values: _Values) -> _Values:
    """Values before the first entry take the first, those behind the last the last."""
    index = np.clip(np.rint(values) - lut.first, 0, lut.values.size - 1)
    found: _Values = lut.values[index.astype(np.int64)]
    return found


def _quantise(shown: _Values) -> Shades:
    # The margin makes a tie round the same way whether or not the image was turned over.
    shades: Shades = np.floor(shown * WHITE + 0.5 + 1e-6).astype(np.uint16)
    return shades
