"""The gray-scale chain and the resize, against the standard's formulas and brute force."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.header import Grayscale, Lut, PixelLayout
from cloister_fl.client.dicom.pixels import preprocess as preprocessing
from cloister_fl.client.dicom.pixels.decoders import decode
from cloister_fl.client.dicom.pixels.preprocess import (
    area_resize,
    preprocess,
    window_linear,
    window_linear_exact,
    window_sigmoid,
)
from cloister_fl.client.dicom.pixels.preprocessing_digest import spec_digest
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Input
from support.dicom import make_dicom, radiograph

WHITE = 65535


def _spec(**values: Any) -> Input:
    return Input.model_validate({"size": 16, **values})


def _layout(stored: NDArray[Any], bits: int = 12, *, signed: bool = False) -> PixelLayout:
    return PixelLayout(stored.shape[0], stored.shape[1], 16, bits, bits - 1, signed)


def _ramp(low: int = 0) -> NDArray[np.int32]:
    """16 x 16 values from ``low`` on, one for each pixel of the result."""
    return np.arange(low, low + 256, dtype=np.int32).reshape(16, 16)


def _shades(stored: NDArray[Any], gray: Grayscale, **options: Any) -> NDArray[np.uint16]:
    bits, signed = options.pop("bits", 12), options.pop("signed", False)
    return preprocess(
        stored.astype(np.int32), _layout(stored, bits, signed=signed), gray, _spec(**options)
    )


def _from_file(pixels: NDArray[Any], spec: Input, **options: Any) -> NDArray[np.uint16]:
    checked = acceptance.precheck(make_dicom(pixels, **options), ("DX", "CT"))
    stored = decode(checked.pixels, checked.transfer_syntax, checked.tags.layout)
    return preprocess(stored, checked.tags.layout, checked.tags.grayscale, spec)


# The formulas of PS3.3 C.11.2.1.2.1, as they stand there, with y from 0 to 1.
@pytest.mark.parametrize(
    ("x", "y"),
    [(-160.0, 0.0), (-159.5, 0.0), (-159.0, 0.5 / 399), (39.5, 0.5), (239.5, 1.0), (300.0, 1.0)],
)
def test_linear_window(x: float, y: float) -> None:
    # c = 40, w = 400: y = 0 up to c - 0.5 - 199.5 = -160.
    expected = 0.0 if x <= -160 else 1.0 if x > 239 else (x - 39.5) / 399 + 0.5
    assert window_linear(np.array([x]), 40, 400)[0] == pytest.approx(expected)
    if x in (-160.0, 39.5, 239.5, 300.0):
        assert expected == y


def test_linear_window_of_width_one_is_a_step() -> None:
    found = window_linear(np.array([9.0, 9.5, 9.6, 10.0]), 10, 1)
    assert found.tolist() == [0, 0, 1, 1]


def test_linear_exact_window() -> None:
    found = window_linear_exact(np.array([-161.0, -160.0, 40.0, 140.0, 240.0, 241.0]), 40, 400)
    assert found.tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_sigmoid_window() -> None:
    found = window_sigmoid(np.array([-1e9, 40.0, 140.0, 1e9]), 40, 400)
    assert found == pytest.approx([0, 0.5, 1 / (1 + np.exp(-1)), 1])


def test_window_of_the_image() -> None:
    found = _shades(_ramp(), Grayscale(False, window=(128, 200)), windowing="voi")
    expected = np.clip((_ramp() - 127.5) / 199 + 0.5, 0, 1) * WHITE
    assert np.abs(found - expected).max() <= 0.501


def test_rescale_comes_before_the_window() -> None:
    gray = Grayscale(False, slope=2.0, intercept=-1024.0, window=(-900, 300))
    found = _shades(_ramp(), gray)
    hounsfield = _ramp() * 2.0 - 1024
    assert np.abs(found - window_linear(hounsfield, -900, 300) * WHITE).max() <= 0.501


def test_fixed_window_of_the_study_beats_the_image() -> None:
    gray = Grayscale(False, slope=1.0, intercept=-1024.0, window=(0, 10))
    found = _shades(_ramp(900), gray, windowing="fixed", window=(0.0, 100.0))
    expected = window_linear_exact(_ramp(900) - 1024.0, 0, 100) * WHITE
    assert np.abs(found - expected).max() <= 0.501


def test_modality_and_voi_tables() -> None:
    modality = Lut(100, 16, np.array([0.0, 10.0, 20.0, 30.0]))
    voi = Lut(5, 8, np.linspace(0, 255, 20))
    gray = Grayscale(False, modality_lut=modality, voi_lut=voi, slope=7.0, window=(1, 1))
    stored = np.full((16, 16), 0, dtype=np.int32)
    stored[0, :5] = [99, 100, 101, 102, 200]
    found = _shades(stored, gray)
    # 99 -> first entry 0 -> before the first of the VOI table; 200 -> last entry 30 -> its last.
    steps = [0, 0, 10 - 5, 20 - 5, 19]
    assert found[0, :5].tolist() == [round(step / 19 * WHITE) for step in steps]


def test_percentiles_where_the_image_has_no_window() -> None:
    stored = np.arange(10_000, dtype=np.int32).reshape(100, 100)
    found = preprocess(stored, _layout(stored, 16), Grayscale(False), _spec(size=100))
    # The 1st percentile of 10,000 rising values is the 100th, the 99th the 9,900th.
    flat = found.ravel()
    assert (flat[:100] == 0).all()
    assert flat[100] == round(1 / 9800 * WHITE)
    assert flat[9898] < WHITE
    assert (flat[9899:] == WHITE).all()


@pytest.mark.parametrize("window", [(100.0, 0.0), (100.0, -5.0), (100.0, 0.5)])
def test_a_window_that_means_nothing(window: tuple[float, float]) -> None:
    plain = _shades(_ramp(), Grayscale(False))
    assert np.array_equal(_shades(_ramp(), Grayscale(False, window=window)), plain)
    with pytest.raises(RejectedFile) as caught:
        _shades(_ramp(), Grayscale(False, window=window), windowing="voi")
    assert caught.value.reason is Reject.PIXEL_FORMAT


def test_percentile_mode_ignores_the_window() -> None:
    plain = _shades(_ramp(), Grayscale(False), windowing="percentile")
    other = _shades(_ramp(), Grayscale(False, window=(10, 20)), windowing="percentile")
    assert np.array_equal(plain, other)


@pytest.mark.parametrize("windowing", ["percentile", "auto", "fixed"])
@pytest.mark.parametrize("voi", ["none", "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_monochrome1_gives_the_tensor_of_monochrome2(windowing: str, voi: str) -> None:
    pixels = radiograph(7)
    spec = _spec(
        windowing=windowing,
        window=(1500.0, 2000.0) if windowing == "fixed" else None,
        percentiles=(2.0, 97.0),
    )
    # Turned over, a value v is 4095 - v; LINEAR's window is centred half a step lower (C.11.2).
    mirrored = 4095 - 1500.0 + (1 if voi == "LINEAR" else 0)
    one: dict[str, Any] = {}
    two: dict[str, Any] = {}
    if voi != "none":
        one = {"WindowCenter": mirrored, "WindowWidth": 2000.0, "VOILUTFunction": voi}
        two = {"WindowCenter": 1500.0, "WindowWidth": 2000.0, "VOILUTFunction": voi}
    spec_one = spec
    if windowing == "fixed":
        spec_one = _spec(windowing="fixed", window=(4095 - 1500.0, 2000.0))
    second = _from_file(pixels, spec, bits_stored=12, elements=two)
    first = _from_file(
        (4095 - pixels).astype(np.uint16),
        spec_one,
        bits_stored=12,
        photometric="MONOCHROME1",
        elements=one,
    )
    assert np.array_equal(first, second)
    assert second.std() > 5000


def test_monochrome1_is_turned_over_at_all() -> None:
    pixels = radiograph(7)
    two = _from_file(pixels, _spec(percentiles=(0.0, 100.0)), bits_stored=12)
    one = _from_file(
        pixels, _spec(percentiles=(0.0, 100.0)), bits_stored=12, photometric="MONOCHROME1"
    )
    assert np.abs(one.astype(int) + two - WHITE).max() <= 1


def test_signed_and_unsigned_give_the_same_tensor() -> None:
    pixels = radiograph(8)
    unsigned = _from_file(
        pixels, _spec(), bits_stored=12, modality="CT", elements={"RescaleIntercept": -1024}
    )
    signed = _from_file(
        (pixels.astype(np.int32) - 1024).astype(np.int16),
        _spec(),
        bits_stored=13,
        modality="CT",
        elements={"RescaleIntercept": 0},
    )
    assert np.array_equal(unsigned, signed)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_depth_does_not_change_the_tensor(bits: int) -> None:
    base = radiograph(9, bits=8)
    shifted = (base.astype(np.int32) << (bits - 8)).astype(np.uint8 if bits == 8 else np.uint16)
    found = _from_file(shifted, _spec(), bits_stored=bits)
    reference = _from_file(base.astype(np.uint8), _spec(), bits_stored=8)
    assert np.array_equal(found, reference)


def test_padding_is_black_and_moves_no_percentile() -> None:
    pixels = radiograph(10).astype(np.int32)
    pixels = np.clip(pixels, 200, 3000)
    framed = pixels.copy()
    framed[:, :10] = 4095
    for inverted in (False, True):
        plain = preprocess(pixels[:, 10:], _layout(pixels[:, 10:]), Grayscale(inverted), _spec())
        gray = Grayscale(inverted, padding=(4000, 4095))
        found = preprocess(framed, _layout(framed), gray, _spec(size=40))
        assert (found[:, :10] == 0).all()
        inner = preprocess(
            pixels[:, 10:], _layout(pixels[:, 10:]), Grayscale(inverted), _spec(size=30)
        )
        assert found[:, 10:].max() == inner.max() == WHITE
        assert plain.max() > 0


def test_nothing_but_padding() -> None:
    stored = np.full((20, 20), 7, dtype=np.int32)
    with pytest.raises(RejectedFile) as caught:
        _shades(stored, Grayscale(False, padding=(7, 7)))
    assert caught.value.reason is Reject.PIXEL_FORMAT


@pytest.mark.parametrize("inverted", [False, True])
def test_an_image_of_one_value_is_mid_gray(inverted: bool) -> None:
    found = _shades(np.full((20, 30), 900, dtype=np.int32), Grayscale(inverted))
    assert set(found.ravel().tolist()) == {32768}


@pytest.mark.parametrize("windowing", ["fixed", "percentile"])
def test_an_image_that_is_looked_up_in_parts(windowing: str) -> None:
    stored = np.random.default_rng(5).integers(-2048, 2048, (701, 503)).astype(np.int32)
    assert stored.size > 2 * preprocessing._PART
    stored[-1, -1] = 2047
    window = (100.0, 3000.0) if windowing == "fixed" else None
    found = _shades(
        stored,
        Grayscale(False),
        signed=True,
        size=64,
        windowing=windowing,
        window=window,
        percentiles=(50.0, 100.0),
    )
    ranked = np.sort(stored.ravel())
    middle = int(ranked[-(-ranked.size // 2) - 1])
    low, high = (-1400.0, 1600.0) if windowing == "fixed" else (float(middle), 2047.0)
    shown = np.clip((stored - low) / (high - low), 0, 1)
    shades = np.floor(shown * WHITE + 0.5 + 1e-6).astype(np.uint16)
    assert np.array_equal(found, area_resize(shades, 64))


def test_two_values_far_apart_in_number_are_still_told_apart() -> None:
    stored = np.zeros((100, 100), dtype=np.int32)
    stored[0, 0] = 1000
    found = preprocess(stored, _layout(stored), Grayscale(False), _spec(size=100))
    assert found[0, 0] == WHITE
    assert found[1:].max() == 0


def _brute_force(image: NDArray[np.uint16], size: int) -> NDArray[np.uint16]:
    """Average over areas in exact fractions."""
    rows, columns = image.shape
    high, wide = Fraction(rows, size), Fraction(columns, size)
    out = np.zeros((size, size), dtype=np.uint16)
    for i in range(size):
        for j in range(size):
            total = Fraction(0)
            top, left = i * high, j * wide
            for r in range(int(top), min(rows, int(top + high) + 1)):
                tall = min(Fraction(r + 1), top + high) - max(Fraction(r), top)
                for c in range(int(left), min(columns, int(left + wide) + 1)):
                    broad = min(Fraction(c + 1), left + wide) - max(Fraction(c), left)
                    if tall > 0 and broad > 0:
                        total += tall * broad * int(image[r, c])
            out[i, j] = int(total / (high * wide) + Fraction(1, 2))
    return out


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(1, 6))
def test_area_resize_is_exact(image: NDArray[np.uint16], size: int) -> None:
    assert np.array_equal(area_resize(image, size), _brute_force(image, size))


def test_area_resize_agrees_with_torch_where_the_ratio_is_whole() -> None:
    import torch

    image = np.random.default_rng(0).integers(0, 65536, (96, 64)).astype(np.uint16)
    found = area_resize(image, 32)
    pooled = torch.nn.functional.interpolate(
        torch.from_numpy(image.astype(np.float64))[None, None], size=(32, 32), mode="area"
    )[0, 0].numpy()
    assert np.abs(found - pooled).max() <= 0.501


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(4096, 1024), (65535, 1), (1, 65535)])
@pytest.mark.parametrize("size", [1, 17, 1024])
def test_area_resize_keeps_the_extremes_of_the_largest_image(
    rows: int, columns: int, size: int
) -> None:
    image = np.full((rows, columns), WHITE, dtype=np.uint16)
    assert (area_resize(image, size) == WHITE).all()


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 255)
    ),
    st.booleans(),
    st.one_of(st.none(), st.tuples(st.floats(-500, 500), st.floats(0.001, 1000))),
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", "ODD"]),
    st.sampled_from([-2.0, 0.5, 1.0, 3.0]),
)
def test_any_image_gives_a_full_square(
    stored: NDArray[np.int32],
    inverted: bool,
    window: tuple[float, float] | None,
    function: str,
    slope: float,
) -> None:
    gray = Grayscale(inverted, slope=slope, window=window, function=function)
    found = preprocess(stored, _layout(stored, 8), gray, _spec())
    assert found.shape == (16, 16)
    assert found.dtype == np.uint16


def test_digest_names_every_part_of_the_input() -> None:
    specs = (
        Input(),
        Input(size=64),
        Input(windowing="voi"),
        Input(percentiles=(2.0, 99.0)),
        Input(windowing="fixed", window=(40.0, 400.0)),
        Input(modalities=("CT",)),
    )
    assert len({spec_digest(spec) for spec in specs}) == len(specs)
    assert spec_digest(Input()) == spec_digest(Input(size=128))


def test_golden_tensor() -> None:
    """The very pixels; if they change, ``SPEC_LABEL`` must change too."""
    stored = (np.add.outer(np.arange(20) * 37, np.arange(24) * 11) % 997).astype(np.int32)
    found = _shades(stored, Grayscale(True, slope=1.5, intercept=-3, window=(700, 900)))
    assert found[::5, ::5].tolist() == GOLDEN


GOLDEN = [
    [65535, 65535, 64512, 55905],
    [57684, 48864, 39642, 30821],
    [32600, 23779, 14557, 5737],
    [7516, 386, 0, 0],
]
