"""Each transfer syntax gives back the stored values, and a bad frame gives a reason."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from itertools import pairwise

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cloister_fl.client.dicom import acceptance, transfer_syntaxes
from cloister_fl.client.dicom.codestream import Frame
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels import decoders as decoding
from cloister_fl.client.dicom.pixels.decoders import DECODERS, check_decoder, decode
from cloister_fl.client.dicom.rejection import RejectedFile, unfit
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import DecoderUnfit, Reject
from cloister_fl.system.installation import install_command
from support.dicom import encode, make_dicom, radiograph, sample

LOSSLESS = sorted(uid for uid, row in TRANSFER_SYNTAXES.items() if not row.lossy)
LOSSY = {
    JPEGBaseline8Bit: 3,
    JPEGExtended12Bit: 8,
    JPEGLSNearLossless: 2,
    JPEG2000: 8,
    HTJ2K: 8,
}
"""How far the lossy ones may be off, in grey levels of 8 or 12 bits, as the tests encode them."""
ENCODED = sorted(TRANSFER_SYNTAXES.keys() - NATIVE)


def _through_a_file(pixels: NDArray[np.generic], bits: int, syntax: str) -> NDArray[np.int32]:
    checked = acceptance.precheck(
        make_dicom(pixels, bits_stored=bits, transfer_syntax=syntax), ("DX",)
    )
    return decode(checked.pixels, checked.transfer_syntax, checked.tags.layout)


def _layout(pixels: NDArray[np.generic], bits: int, *, signed: bool = False) -> PixelLayout:
    wide = pixels.dtype.itemsize * 8
    return PixelLayout(pixels.shape[0], pixels.shape[1], wide, bits, bits - 1, signed)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_lossless_unsigned(syntax: str, bits: int) -> None:
    pixels = radiograph(3, bits=bits)
    if bits == 8:
        pixels = pixels.astype(np.uint8)
    assert np.array_equal(_through_a_file(pixels, bits, syntax), pixels)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_lossless_signed(syntax: str, bits: int) -> None:
    half = 1 << (bits - 1)
    pixels = (radiograph(4, bits=bits).astype(np.int32) - half).astype(np.int16)
    assert pixels.min() == -half
    assert pixels.max() == half - 1
    assert np.array_equal(_through_a_file(pixels, bits, syntax), pixels)


@pytest.mark.parametrize(("syntax", "tolerance"), LOSSY.items())
def test_lossy(syntax: str, tolerance: int) -> None:
    pixels, bits = sample(syntax, 5)
    found = _through_a_file(pixels, bits, syntax)
    # It does lose something, else a row that says so would be wrong.
    assert 0 < np.abs(found - pixels).max() <= tolerance


def test_every_syntax_is_tested() -> None:
    assert {*LOSSLESS, *LOSSY} == TRANSFER_SYNTAXES.keys()


def test_what_stands_in_unused_bits_is_dropped() -> None:
    pixels = np.array([[0xF00F, 0x0FFF], [0x1800, 0x07FF]], dtype=np.uint16)
    data = pixels.astype("<u2").tobytes()
    unsigned = decode(data, ExplicitVRLittleEndian, _layout(pixels, 12))
    assert unsigned.tolist() == [[0x00F, 0xFFF], [0x800, 0x7FF]]
    signed = decode(data, ExplicitVRLittleEndian, _layout(pixels, 12, signed=True))
    assert signed.tolist() == [[15, -1], [-2048, 2047]]


def test_the_overshoot_of_a_lossy_coding_is_clipped_not_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = radiograph()
    frame = encode(pixels, HTJ2K, 16)
    over = np.full(pixels.shape, 4100, dtype=np.uint16)
    check_decoder(HTJ2K)
    monkeypatch.setitem(DECODERS, transfer_syntaxes.HTJ2K, lambda _data, _frame: over)
    assert (decode(frame, HTJ2K, _layout(pixels, 12)) == 4095).all()


@pytest.mark.parametrize("syntax", ENCODED)
def test_decoder_is_checked_before_it_is_trusted(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decoder.cache_clear()
    row = TRANSFER_SYNTAXES[syntax]
    right = DECODERS[row.family]

    def wrong(data: bytes, frame: Frame) -> NDArray[np.generic]:
        values = np.array(right(data, frame))
        values[-1, -1] -= values.dtype.type(row.tolerance + 4)
        return values

    pixels, bits = sample(syntax)
    monkeypatch.setitem(DECODERS, row.family, wrong)
    with pytest.raises(DecoderUnfit):
        _through_a_file(pixels, bits, syntax)
    alike = {uid for uid, other in TRANSFER_SYNTAXES.items() if other.family == row.family}
    assert syntax in decoding.unfit_decoders()
    assert set(decoding.unfit_decoders()) <= alike
    monkeypatch.setitem(DECODERS, row.family, right)
    _through_a_file(pixels, bits, syntax)
    assert decoding.unfit_decoders() == ()


def test_our_own_decoder_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    check_decoder.cache_clear()
    right = DECODERS[transfer_syntaxes.RLE]
    swapped = lambda data, frame: right(data, frame).byteswap()  # noqa: E731
    monkeypatch.setitem(DECODERS, transfer_syntaxes.RLE, swapped)
    with pytest.raises(DecoderUnfit):
        _through_a_file(radiograph(), 12, RLELossless)
    assert decoding.unfit_decoders() == (RLELossless,)
    monkeypatch.setitem(DECODERS, transfer_syntaxes.RLE, right)
    assert np.array_equal(_through_a_file(radiograph(), 12, RLELossless), radiograph())
    assert decoding.unfit_decoders() == ()


def _by_pillow(frame: bytes) -> NDArray[np.generic]:
    # It spreads the 12 bits of a JPEG 2000 image over 16.
    with Image.open(io.BytesIO(frame)) as image:
        values = np.asarray(image)
    return values if values.dtype == np.uint8 else values >> 4


def _by_packbits(frame: bytes) -> NDArray[np.generic]:
    offsets = (*struct.unpack_from("<2I", frame, 4), len(frame))
    planes = [imagecodecs.packbits_decode(frame[a:b]) for a, b in pairwise(offsets)]
    high, low = (np.frombuffer(plane[: 48 * 40], np.uint8).astype("<u2") for plane in planes)
    return (high << 8 | low).reshape(48, 40)


ANOTHER: dict[str, tuple[Callable[[bytes], NDArray[np.generic]], int]] = {
    JPEGBaseline8Bit: (_by_pillow, 1),
    JPEGLossless: (imagecodecs.ljpeg_decode, 0),
    JPEGLosslessSV1: (imagecodecs.ljpeg_decode, 0),
    JPEGLSLossless: (imagecodecs.jpegls_decode, 0),
    JPEGLSNearLossless: (imagecodecs.jpegls_decode, 0),
    JPEG2000Lossless: (_by_pillow, 0),
    JPEG2000: (_by_pillow, 1),
    HTJ2KLossless: (imagecodecs.htj2k_decode, 0),
    HTJ2KLosslessRPCL: (imagecodecs.htj2k_decode, 0),
    HTJ2K: (imagecodecs.htj2k_decode, 1),
    RLELossless: (_by_packbits, 0),
}
"""A decoder that is not the product's, and by how many grey levels it may differ."""
NO_OTHER = {
    JPEGExtended12Bit: "no second decoder here knows 12 bits",
}


@pytest.mark.parametrize("syntax", ANOTHER)
def test_another_decoder_agrees(syntax: str) -> None:
    another, apart = ANOTHER[syntax]
    pixels, bits = sample(syntax, 6)
    frame = encode(pixels, syntax, bits)
    found = decode(frame, syntax, _layout(pixels, bits))
    assert np.abs(found - np.asarray(another(frame)).astype(np.int32)).max() <= apart
    assert found.std() > 40


def test_every_coding_has_another_decoder_or_a_reason() -> None:
    assert sorted({**ANOTHER, **NO_OTHER}) == ENCODED


class _Panic(BaseException):
    """What an extension in Rust raises."""


@pytest.mark.parametrize("error", [_Panic, RuntimeError, ValueError])
def test_whatever_a_decoder_raises_is_a_reason(
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(_data: bytes, _frame: Frame) -> object:
        warnings.warn("CANARY", stacklevel=1)
        raise error("CANARY")

    check_decoder(JPEGLSLossless)
    pixels = radiograph()
    frame = encode(pixels, JPEGLSLossless, 12)
    monkeypatch.setitem(DECODERS, transfer_syntaxes.JPEG_LS, broken)
    with caplog.at_level(logging.DEBUG), pytest.raises(RejectedFile) as caught:
        decode(frame, JPEGLSLossless, _layout(pixels, 12))
    assert caught.value.reason is Reject.DECODE_FAILED
    assert caught.value.__cause__ is None
    assert "CANARY" not in caplog.text + str(capfd.readouterr()) + str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_must_pass_passes(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_data: bytes, _frame: Frame) -> object:
        raise error

    check_decoder(JPEGLSLossless)
    pixels = radiograph()
    frame = encode(pixels, JPEGLSLossless, 12)
    monkeypatch.setitem(DECODERS, transfer_syntaxes.JPEG_LS, stop)
    with pytest.raises(error):
        decode(frame, JPEGLSLossless, _layout(pixels, 12))


@pytest.mark.parametrize(
    "answer",
    [
        np.zeros((3, 3), np.uint16),
        np.zeros((48, 40, 3), np.uint8),
        np.zeros((48, 40), np.float32),
        np.zeros((48, 40), np.int64),
        None,
    ],
)
def test_an_answer_of_another_form_is_refused(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decoder(JPEGLSLossless)
    pixels = radiograph()
    frame = encode(pixels, JPEGLSLossless, 12)
    monkeypatch.setitem(DECODERS, transfer_syntaxes.JPEG_LS, lambda _data, _frame: answer)
    with pytest.raises(RejectedFile):
        decode(frame, JPEGLSLossless, _layout(pixels, 12))


def test_rle_example_of_the_standards_shape() -> None:
    # PS3.5 G.3.2: 2 literal bytes, a run of 3, a no-op, and the end of the row.
    segment = bytes([1, 10, 20, 254, 7, 128, 0, 9])
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + segment
    layout = PixelLayout(2, 3, 8, 8, 7, False)
    assert decode(frame, RLELossless, layout).tolist() == [[10, 20, 7], [7, 7, 9]]


def test_rle_that_expands_without_end_stops_at_the_image() -> None:
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + bytes([129, 7]) * 100_000
    tracemalloc.start()
    try:
        with pytest.raises(RejectedFile):
            decode(frame, RLELossless, PixelLayout(2, 3, 8, 8, 7, False))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_rle_that_ends_early() -> None:
    frame = struct.pack("<16I", 1, 64, *([0] * 14))
    for segment in (b"", b"\x05abc", b"\xfe", b"\x00a", b"\x80\x80\x80"):
        with pytest.raises(RejectedFile):
            decode(frame + segment, RLELossless, PixelLayout(2, 3, 8, 8, 7, False))


def _or_none(unpack: Callable[..., bytes], data: bytes, size: int) -> bytes | None:
    try:
        return bytes(unpack(data, 3, len(data) - 2, size))
    except RejectedFile:
        return None


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from((0, 1, 2, 5, 127, 128, 129, 253, 254, 255)), max_size=40),
    st.integers(1, 60),
)
def test_a_compiled_segment_is_what_the_standard_says(words: list[int], size: int) -> None:
    data = b"<<<" + bytes(words) + b">>"
    assert _or_none(decoding._plane, data, size) == _or_none(decoding._unpack_bits, data, size)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_rle_never_raises_anything_else(segment: bytes) -> None:
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + segment
    try:
        found = decode(frame, RLELossless, PixelLayout(4, 4, 8, 8, 7, False))
    except RejectedFile:
        return
    assert found.shape == (4, 4)


def test_an_unfit_decoder_names_the_command_that_installs_the_pinned_versions() -> None:
    assert unfit(RLELossless).remedy == f"Install the pinned versions: {install_command('client')}"
