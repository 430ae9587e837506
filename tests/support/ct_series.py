"""Series of slices for tests: a volume written as a scanner would, upright or oblique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.dicom import uid, write_dicom

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((2 / 3, 2 / 3, 1 / 3), (-2 / 3, 1 / 3, 2 / 3))
"""Direction cosines of row and column; the normal is (1/3, -2/3, 2/3)."""

Stored = NDArray[np.uint16]
Cosines = tuple[tuple[float, float, float], tuple[float, float, float]]


def phantom(slices: int = 9, side: int = 24) -> Stored:
    """12 bits; every second slice is the mean of its neighbours, to the bit."""
    z, y, x = np.mgrid[0:slices, 0:side, 0:side]
    knots = np.random.default_rng(5).integers(0, 500, (slices // 2 + 1, side, side)) * 2
    shape = 1000 + 40 * y + 20 * x
    even = (shape[::2] + knots[: len(shape[::2])]) // 2 * 2
    volume = np.empty(z.shape, np.int64)
    volume[::2] = even
    volume[1::2] = (even[:-1] + even[1:])[: len(volume[1::2])] // 2
    return volume.astype(np.uint16)


def decimals(values: Sequence[float]) -> list[str]:
    """Decimal strings of at most 16 characters (PS3.5 section 6.2, DS)."""
    return [f"{value:.10f}"[:16] for value in values]


def place(
    where: float, cosines: Cosines = AXIAL, origin: Sequence[float] = (-120.5, -80.25, 33.0)
) -> list[float]:
    """Image Position (Patient) of a slice ``where`` mm along the normal."""
    normal = np.cross(*cosines)
    return [float(start + where * step) for start, step in zip(origin, normal, strict=True)]


def write_series(
    folder: Path,
    volume: Stored,
    *,
    patient: str = "P1",
    series: str = "s",
    step: float = 1.0,
    cosines: Cosines = AXIAL,
    order: Sequence[int] | None = None,
    modality: str = "CT",
    change: Mapping[int, Mapping[str, Any]] | None = None,
    without: Mapping[int, Sequence[str]] | None = None,
) -> list[str]:
    """Write one file a slice; slice ``k`` lies ``k * step`` mm along the normal.

    Args:
        volume: 12 bits, (slices, rows, columns).
        order: which slice is in the first file, the second, and so on; a slice left out has none.
        change: elements by slice, in place of what belongs there.
        without: keywords to leave out, by slice.

    Returns:
        SOP Instance UIDs by file.
    """
    written = []
    for number, k in enumerate(range(len(volume)) if order is None else order):
        elements: dict[str, Any] = {
            "SeriesInstanceUID": uid("series", patient, series),
            "FrameOfReferenceUID": uid("frame", patient),
            "SOPInstanceUID": uid("slice", patient, series, k),
            "ImagePositionPatient": decimals(place(k * step, cosines)),
            "ImageOrientationPatient": decimals([*cosines[0], *cosines[1]]),
            "PixelSpacing": ["0.7", "0.7"],
            **(change or {}).get(k, {}),
        }
        path = folder / f"{series}-{number:03d}.dcm"
        written.append(
            write_dicom(
                path,
                volume[k],
                patient_id=patient,
                modality=modality,
                bits_stored=12,
                elements=elements,
                without=["BurnedInAnnotation", *(without or {}).get(k, ())],
            )
        )
    return written
