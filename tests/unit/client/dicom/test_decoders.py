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

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels import decoders as decoding
from cloister_fl.client.dicom.pixels import known_answers
from cloister_fl.client.dicom.pixels.decoders import check_decoder, decode
from cloister_fl.client.dicom.rejection import RejectedFile, unfit
from cloister_fl.errors import DecoderUnfit, Reject
from cloister_fl.system.installation import install_command
from support.dicom import encode, make_dicom, radiograph

LOSSLESS = sorted(
    (
        acceptance.IMPLICIT_LITTLE,
        acceptance.EXPLICIT_LITTLE,
        acceptance.RLE,
        acceptance.JPEG_LOSSLESS,
        acceptance.JPEG_LOSSLESS_SV1,
        acceptance.JPEG_LS_LOSSLESS,
        acceptance.JPEG_2000_LOSSLESS,
        acceptance.HTJ2K_LOSSLESS,
        acceptance.HTJ2K_LOSSLESS_RPCL,
    )
)
ENCODED = sorted(acceptance.TRANSFER_SYNTAXES - acceptance.NATIVE)


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


@pytest.mark.parametrize(
    ("syntax", "bits", "tolerance"),
    [
        (acceptance.JPEG_BASELINE, 8, 3),
        (acceptance.JPEG_EXTENDED, 12, 8),
        (acceptance.JPEG_LS_NEAR, 12, 2),
        (acceptance.JPEG_2000, 12, 8),
        (acceptance.HTJ2K, 12, 8),
    ],
)
def test_lossy(syntax: str, bits: int, tolerance: int) -> None:
    pixels = radiograph(5, bits=bits)
    if bits == 8:
        pixels = pixels.astype(np.uint8)
    found = _through_a_file(pixels, bits, syntax)
    assert np.abs(found - pixels).max() <= tolerance


def test_every_syntax_is_tested() -> None:
    lossy = {
        acceptance.JPEG_BASELINE,
        acceptance.JPEG_EXTENDED,
        acceptance.JPEG_LS_NEAR,
        acceptance.JPEG_2000,
        acceptance.HTJ2K,
    }
    assert set(LOSSLESS) | lossy == acceptance.TRANSFER_SYNTAXES


def test_what_stands_in_unused_bits_is_dropped() -> None:
    pixels = np.array([[0xF00F, 0x0FFF], [0x1800, 0x07FF]], dtype=np.uint16)
    data = pixels.astype("<u2").tobytes()
    unsigned = decode(data, acceptance.EXPLICIT_LITTLE, _layout(pixels, 12))
    assert unsigned.tolist() == [[0x00F, 0xFFF], [0x800, 0x7FF]]
    signed = decode(data, acceptance.EXPLICIT_LITTLE, _layout(pixels, 12, signed=True))
    assert signed.tolist() == [[15, -1], [-2048, 2047]]


def test_the_overshoot_of_a_lossy_coding_is_clipped_not_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = radiograph()
    frame = encode(pixels, acceptance.HTJ2K, 16)
    over = np.full(pixels.shape, 4100, dtype=np.uint16)
    check_decoder(acceptance.HTJ2K)
    monkeypatch.setitem(decoding._DECODERS, acceptance.HTJ2K, lambda _data: over)
    assert (decode(frame, acceptance.HTJ2K, _layout(pixels, 12)) == 4095).all()


@pytest.mark.parametrize("syntax", sorted(set(ENCODED) - {acceptance.RLE}))
def test_decoder_is_checked_before_it_is_trusted(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decoder.cache_clear()
    right = decoding._DECODERS[syntax]
    off_by = known_answers.TOLERANCE[decoding._VECTOR[syntax]] + 4

    def wrong(data: bytes) -> NDArray[np.generic]:
        values = np.array(right(data))
        values[-1, -1] -= values.dtype.type(off_by)
        return values

    bits = 8 if syntax == acceptance.JPEG_BASELINE else 12
    pixels = radiograph(bits=bits).astype(np.uint8 if bits == 8 else np.uint16)
    monkeypatch.setitem(decoding._DECODERS, syntax, wrong)
    with pytest.raises(DecoderUnfit):
        _through_a_file(pixels, bits, syntax)
    monkeypatch.setitem(decoding._DECODERS, syntax, right)
    _through_a_file(pixels, bits, syntax)


def test_our_own_decoder_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    check_decoder.cache_clear()
    right = decoding._rle
    monkeypatch.setattr(
        decoding, "_rle", lambda data, layout: right(data, layout).astype("<u2").byteswap()
    )
    with pytest.raises(DecoderUnfit):
        _through_a_file(radiograph(), 12, acceptance.RLE)
    assert decoding.unfit_decoders() == (acceptance.RLE,)
    monkeypatch.setattr(decoding, "_rle", right)
    assert np.array_equal(_through_a_file(radiograph(), 12, acceptance.RLE), radiograph())
    assert decoding.unfit_decoders() == ()


def test_every_coding_has_a_known_answer() -> None:
    assert set(decoding._VECTOR) == set(ENCODED)
    assert (
        set(decoding._VECTOR.values()) == set(known_answers.ENCODED) == set(known_answers.TOLERANCE)
    )


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


@pytest.mark.parametrize(
    ("syntax", "another", "apart"),
    [
        (acceptance.JPEG_BASELINE, _by_pillow, 1),
        (acceptance.JPEG_LOSSLESS, imagecodecs.ljpeg_decode, 0),
        (acceptance.JPEG_LOSSLESS_SV1, imagecodecs.ljpeg_decode, 0),
        (acceptance.JPEG_LS_LOSSLESS, imagecodecs.jpegls_decode, 0),
        (acceptance.JPEG_LS_NEAR, imagecodecs.jpegls_decode, 0),
        (acceptance.JPEG_2000_LOSSLESS, _by_pillow, 0),
        (acceptance.JPEG_2000, _by_pillow, 1),
        (acceptance.HTJ2K_LOSSLESS, imagecodecs.htj2k_decode, 0),
        (acceptance.HTJ2K_LOSSLESS_RPCL, imagecodecs.htj2k_decode, 0),
        (acceptance.HTJ2K, imagecodecs.htj2k_decode, 1),
        (acceptance.RLE, _by_packbits, 0),
    ],
)
def test_another_decoder_agrees(
    syntax: str, another: Callable[[bytes], NDArray[np.generic]], apart: int
) -> None:
    """JPEG Extended has no second decoder here that knows 12 bits."""
    bits = 8 if syntax == acceptance.JPEG_BASELINE else 12
    pixels = radiograph(6, bits=bits).astype(np.uint8 if bits == 8 else np.uint16)
    frame = encode(pixels, syntax, bits)
    found = decode(frame, syntax, _layout(pixels, bits))
    assert np.abs(found - np.asarray(another(frame)).astype(np.int32)).max() <= apart
    assert found.std() > 40


class _Panic(BaseException):
    """What an extension in Rust raises."""


@pytest.mark.parametrize("error", [_Panic, RuntimeError, ValueError])
def test_whatever_a_decoder_raises_is_a_reason(
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(_data: bytes) -> object:
        warnings.warn("CANARY", stacklevel=1)
        raise error("CANARY")

    check_decoder(acceptance.JPEG_LS_LOSSLESS)
    pixels = radiograph()
    frame = encode(pixels, acceptance.JPEG_LS_LOSSLESS, 12)
    monkeypatch.setitem(decoding._DECODERS, acceptance.JPEG_LS_LOSSLESS, broken)
    with caplog.at_level(logging.DEBUG), pytest.raises(RejectedFile) as caught:
        decode(frame, acceptance.JPEG_LS_LOSSLESS, _layout(pixels, 12))
    assert caught.value.reason is Reject.DECODE_FAILED
    assert caught.value.__cause__ is None
    assert "CANARY" not in caplog.text + str(capfd.readouterr()) + str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_must_pass_passes(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_data: bytes) -> object:
        raise error

    check_decoder(acceptance.JPEG_LS_LOSSLESS)
    pixels = radiograph()
    frame = encode(pixels, acceptance.JPEG_LS_LOSSLESS, 12)
    monkeypatch.setitem(decoding._DECODERS, acceptance.JPEG_LS_LOSSLESS, stop)
    with pytest.raises(error):
        decode(frame, acceptance.JPEG_LS_LOSSLESS, _layout(pixels, 12))


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
    check_decoder(acceptance.JPEG_LS_LOSSLESS)
    pixels = radiograph()
    frame = encode(pixels, acceptance.JPEG_LS_LOSSLESS, 12)
    monkeypatch.setitem(decoding._DECODERS, acceptance.JPEG_LS_LOSSLESS, lambda _data: answer)
    with pytest.raises(RejectedFile):
        decode(frame, acceptance.JPEG_LS_LOSSLESS, _layout(pixels, 12))


def test_rle_example_of_the_standards_shape() -> None:
    # PS3.5 G.3.2: 2 literal bytes, a run of 3, a no-op, and the end of the row.
    segment = bytes([1, 10, 20, 254, 7, 128, 0, 9])
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + segment
    layout = PixelLayout(2, 3, 8, 8, 7, False)
    assert decode(frame, acceptance.RLE, layout).tolist() == [[10, 20, 7], [7, 7, 9]]


def test_rle_that_expands_without_end_stops_at_the_image() -> None:
    frame = struct.pack("<16I", 1, 64, *([0] * 14)) + bytes([129, 7]) * 100_000
    tracemalloc.start()
    try:
        with pytest.raises(RejectedFile):
            decode(frame, acceptance.RLE, PixelLayout(2, 3, 8, 8, 7, False))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_rle_that_ends_early() -> None:
    frame = struct.pack("<16I", 1, 64, *([0] * 14))
    for segment in (b"", b"\x05abc", b"\xfe", b"\x00a", b"\x80\x80\x80"):
        with pytest.raises(RejectedFile):
            decode(frame + segment, acceptance.RLE, PixelLayout(2, 3, 8, 8, 7, False))


def _or_none(unpack: Callable[..., bytes], data: bytes, size: int) -> bytes | None:
    try:
        return bytes(unpack(data, 3, len(data) - 2, size))
    except RejectedFile:
        return None


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
        found = decode(frame, acceptance.RLE, PixelLayout(4, 4, 8, 8, 7, False))
    except RejectedFile:
        return
    assert found.shape == (4, 4)


def test_an_unfit_decoder_names_the_command_that_installs_the_pinned_versions() -> None:
    assert (
        unfit(acceptance.RLE).remedy == f"Install the pinned versions: {install_command('client')}"
    )
