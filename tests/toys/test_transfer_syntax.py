"""The toy of docs/guides/add-a-transfer-syntax.md is read from a file to an image."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator

import numpy as np
import pynetdicom  # noqa: F401 - tells pydicom of transfer syntaxes that are newer than it is
import pytest

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.codestream import check_codestream
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels import known_answers
from cloister_fl.client.dicom.pixels.decoders import check_decoder, decode, unfit_decoders
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.errors import DecoderUnfit, Reject
from cloister_fl.study.schema import Input
from support import bundled_files
from support.dicom import make_dicom, radiograph
from toys.deflated_frames import DEFLATE, KNOWN_ANSWER, PARTS, ROW

SPEC = Input(size=32, modalities=("DX",))
PIXELS = radiograph(3)
LAYOUT = PixelLayout(48, 40, 16, 12, 11, False)


def _deflated(data: bytes, end: int = zlib.Z_FINISH) -> bytes:
    stream = zlib.compressobj(9, wbits=-15)
    return stream.compress(data) + stream.flush(end)


FRAME = _deflated(PIXELS.astype("<u2").tobytes())
FILE = make_dicom(PIXELS, bits_stored=12, transfer_syntax=ROW.uid, encoded=FRAME)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy stands in the product's tables."""
    check_decoder.cache_clear()
    for table, key, value in PARTS:
        monkeypatch.setitem(table, key, value)
    yield
    check_decoder.cache_clear()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(1, module="toys.deflated_frames_worker")
    yield made
    made.close()


def _reason(data: bytes) -> Reject | None:
    try:
        acceptance.precheck(data, ("DX",))
    except RejectedFile as rejected:
        return rejected.reason
    return None


def test_the_product_does_not_read_it() -> None:
    assert _reason(FILE) is Reject.TRANSFER_SYNTAX
    own = Pool(1)
    try:
        with pytest.raises(RejectedFile) as caught:
            own.submit(FILE, SPEC).result()
    finally:
        own.close()
    assert caught.value.reason is Reject.TRANSFER_SYNTAX


def test_a_file_is_read_through_a_worker(pool: Pool) -> None:
    facts, image = pool.submit(FILE, SPEC).result()
    plain = make_dicom(PIXELS, bits_stored=12)
    expected, shown = pool.submit(plain, SPEC).result()
    assert facts == expected
    assert np.array_equal(image, shown)
    assert image.std() > 5000


@pytest.mark.usefixtures("added")
def test_stored_values_come_back() -> None:
    for bits, kind in ((8, np.uint8), (12, np.uint16), (16, np.uint16)):
        pixels = radiograph(4, bits=bits).astype(kind)
        frame = _deflated(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())
        data = make_dicom(pixels, bits_stored=bits, transfer_syntax=ROW.uid, encoded=frame)
        checked = acceptance.precheck(data, ("DX",))
        found = decode(checked.pixels, checked.transfer_syntax, checked.tags.layout)
        assert np.array_equal(found, pixels), bits


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("side", [181, 256, 257, 512])
def test_an_image_that_hardly_takes_a_byte_is_read_to_its_end(side: int) -> None:
    pixels = np.full((side, side), 7, np.uint16)
    frame = _deflated(pixels.tobytes())
    data = make_dicom(pixels, transfer_syntax=ROW.uid, encoded=frame)
    checked = acceptance.precheck(data, ("DX",))
    found = decode(checked.pixels, checked.transfer_syntax, checked.tags.layout)
    assert np.array_equal(found, pixels)


@pytest.mark.usefixtures("added")
def test_the_known_answer_is_met_and_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unfit_decoders() == ()
    layout = PixelLayout(known_answers.ROWS, known_answers.COLUMNS, 16, 12, 11, False)
    frame = base64.b64decode(KNOWN_ANSWER)
    check_codestream(frame, ROW.uid, layout)
    check_decoder.cache_clear()
    monkeypatch.delitem(known_answers.ENCODED, ROW.known_answer)
    with pytest.raises(DecoderUnfit):
        decode(FRAME, ROW.uid, LAYOUT)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (FRAME[:-8], Reject.TRUNCATED),
        (FRAME[: len(FRAME) // 2], Reject.TRUNCATED),
        (_deflated(PIXELS.astype("<u2").tobytes()[:-2]), Reject.TRUNCATED),
        (_deflated(PIXELS.astype("<u2").tobytes() + bytes(2)), Reject.PIXEL_FORMAT),
        # Whole, but its last block does not say so.
        (_deflated(PIXELS.astype("<u2").tobytes(), zlib.Z_SYNC_FLUSH), Reject.TRUNCATED),
        # What follows is no block, and nobody came that far.
        (_deflated(bytes(1 << 24), zlib.Z_SYNC_FLUSH) + b"\xff" * 8, Reject.PIXEL_FORMAT),
        (FRAME + b"PK\3\4", Reject.DECODE_FAILED),
        (zlib.compress(PIXELS.astype("<u2").tobytes()), Reject.DECODE_FAILED),
        (b"\xff\xd8\xff\xd9", Reject.DECODE_FAILED),
    ],
)
def test_a_damaged_or_lying_frame_is_refused(frame: bytes, reason: Reject) -> None:
    data = make_dicom(PIXELS, bits_stored=12, transfer_syntax=ROW.uid, encoded=frame)
    assert _reason(data) is reason


def test_a_damaged_file_costs_itself_alone(pool: Pool) -> None:
    cut = make_dicom(PIXELS, bits_stored=12, transfer_syntax=ROW.uid, encoded=FRAME[:99])
    with pytest.raises(RejectedFile) as caught:
        pool.submit(cut, SPEC).result()
    assert caught.value.reason is Reject.TRUNCATED
    assert pool.submit(FILE, SPEC).result()[1].shape == (32, 32)


@pytest.mark.usefixtures("added")
def test_the_page_would_have_its_line() -> None:
    line = f"| {ROW.name} | `{ROW.uid}` | {DEFLATE.decoder} |"
    assert line in bundled_files.tables([])["decoders"].splitlines()
