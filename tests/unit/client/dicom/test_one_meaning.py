"""One picture, written in every way that the standard allows, is one tensor.

972 files: MONOCHROME1 and 2, signed and unsigned, 8 to 16 bits, three ways to rescale, three to
pad, three to window. What must come out is worked out here from the picture alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.pixels.decoders import decode
from cloister_fl.client.dicom.pixels.preprocess import preprocess
from cloister_fl.study.schema import Input
from support.dicom import make_dicom

SIDE, SIZE = 32, 16
TOP = 100
"""Largest value of the picture; the smallest is 0, which its left and lower edges have too."""
CENTRE, WIDTH = 45.0, 70.0
"""The window in the picture's own values; it begins above 0, so the edges are black in it."""


def _picture() -> NDArray[np.int32]:
    made = np.random.default_rng(11).integers(0, TOP + 1, (SIDE, SIDE)).astype(np.int32)
    made[0, -2:] = 0, TOP  # else a picture without one of them would be stretched otherwise
    made[_edge()] = 0
    return made


def _edge() -> NDArray[np.bool_]:
    edge = np.zeros((SIDE, SIDE), dtype=bool)
    edge[:, :3] = edge[-5:] = True
    return edge


def _expected(windowing: str) -> NDArray[np.uint16]:
    """In whole numbers: shade = WHITE x part, halves up, then the mean of four, halves up."""
    picture = _picture().astype(np.int64)
    low, width = (0, TOP) if windowing == "percentile" else (int(CENTRE - WIDTH / 2), int(WIDTH))
    part = np.clip(picture - low, 0, width)
    shades = (2 * 65535 * part + width) // (2 * width)
    fours = shades.reshape(SIZE, 2, SIZE, 2).sum(axis=(1, 3))
    return ((fours + 2) // 4).astype(np.uint16)


@dataclass(frozen=True)
class Form:
    """A way to write the picture down.

    Attributes:
        rescale: "none"; "shift" has an intercept; "scale" uses all bits and has a slope too.
        padding: "none"; "value" fills the edges with a padding value; "range" with several.
    """

    inverted: bool
    signed: bool
    bits: int
    rescale: str
    padding: str

    @property
    def least(self) -> int:
        """The smallest stored value, where the picture begins."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def zero(self) -> int:
        """The modality value of the smallest stored value."""
        return {"none": self.least, "shift": -1024, "scale": 0}[self.rescale]

    @property
    def window(self) -> tuple[float, float]:
        """The picture's window in modality values."""
        return (TOP - CENTRE if self.inverted else CENTRE) + self.zero, WIDTH


def _forms(bits: int) -> list[Form]:
    return [
        Form(inverted, signed, bits, rescale, padding)
        for inverted, signed, rescale, padding in itertools.product(
            (False, True), (False, True), ("none", "shift", "scale"), ("none", "value", "range")
        )
    ]


def _stored(form: Form) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return the stored values, and the elements that tell their meaning."""
    shift = form.bits - 8 if form.rescale == "scale" else 0
    meant = TOP - _picture() if form.inverted else _picture()
    stored = (meant << shift) + form.least
    last = form.least + (1 << form.bits) - 1
    elements: dict[str, Any] = {}
    if form.rescale != "none":
        slope = 1 / (1 << shift)
        elements["RescaleSlope"] = str(slope)
        elements["RescaleIntercept"] = str(form.zero - form.least * slope)
    if form.padding == "value":
        stored[_edge()] = last
        elements["PixelPaddingValue"] = last
    elif form.padding == "range":
        stored[_edge()] = last - np.arange(_edge().sum()) % 11
        elements |= {"PixelPaddingValue": last, "PixelPaddingRangeLimit": last - 10}
    kind = ("i" if form.signed else "u") + ("1" if form.bits == 8 else "2")
    narrow = stored.astype(kind)
    assert np.array_equal(narrow, stored)
    return narrow, elements


def _tensor(form: Form, windowing: str) -> NDArray[np.uint16]:
    """Write the file, and read it as the product does."""
    stored, elements = _stored(form)
    if windowing == "voi":
        centre, width = form.window
        elements["WindowCenter"], elements["WindowWidth"] = str(centre), str(width)
        elements["VOILUTFunction"] = "LINEAR_EXACT"
    study = Input(
        size=SIZE,
        windowing=windowing,
        percentiles=(0.0, 100.0),
        window=form.window if windowing == "fixed" else None,
    )
    data = make_dicom(
        stored,
        bits_stored=form.bits,
        photometric="MONOCHROME1" if form.inverted else "MONOCHROME2",
        elements=elements,
    )
    checked = acceptance.precheck(data, ("DX",))
    layout, grayscale = checked.tags.layout, checked.tags.grayscale
    found = decode(checked.pixels, checked.transfer_syntax, layout)
    assert np.array_equal(found, stored)
    return preprocess(found, layout, grayscale, study)


@pytest.mark.long
@pytest.mark.parametrize("windowing", ["percentile", "voi", "fixed"])
@pytest.mark.parametrize("bits", range(8, 17))
def test_every_form_gives_the_same_tensor(bits: int, windowing: str) -> None:
    expected = _expected(windowing)
    assert [
        form for form in _forms(bits) if not np.array_equal(_tensor(form, windowing), expected)
    ] == []


def test_the_forms_are_all_there_and_differ() -> None:
    forms = [form for bits in range(8, 17) for form in _forms(bits)]
    assert 3 * len(forms) == 972
    # Beside the values, the sign and the depth tell two of them apart.
    written = {
        (_stored(form)[0].tobytes(), str(_stored(form)[1]), form.bits, form.signed, form.inverted)
        for form in forms
    }
    assert len(written) == len(forms)


def test_the_picture_shows_what_could_go_wrong() -> None:
    percentile, window = _expected("percentile"), _expected("voi")
    assert percentile.std() > 5000
    assert not np.array_equal(percentile, window)
    # The edges are black in both: what is padding there and what is not must look the same.
    edge = _edge().reshape(SIZE, 2, SIZE, 2).all(axis=(1, 3))
    assert edge.sum() > 40
    assert not percentile[edge].any()
    assert not window[edge].any()
