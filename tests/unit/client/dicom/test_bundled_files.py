"""pydicom's own test files: what becomes of them, and the pixels of those that are read."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from cloister_fl.client.dicom import acceptance, structure
from cloister_fl.client.dicom.codestream import check_codestream
from cloister_fl.client.dicom.header import WANTED, parse_tags
from cloister_fl.client.dicom.pixels.decoders import decode
from cloister_fl.client.dicom.pixels.preprocess import preprocess
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from support import bundled_files
from support.bundled_files import Bundled, fill, read_bundled, tables


@pytest.fixture(scope="module")
def files() -> Iterator[list[Bundled]]:
    pool = Pool(1)
    try:
        yield read_bundled(pool)
    finally:
        pool.close()


def _named(files: list[Bundled], name: str) -> Bundled:
    (found,) = (file for file in files if file.path.name == name)
    return found


def _header(data: bytes) -> Dataset:
    with warnings.catch_warnings():
        # Some files break the standard's form of a value, which is why they are there.
        warnings.simplefilter("ignore")
        return pydicom.dcmread(io.BytesIO(data))


def _by_another(file: Bundled) -> NDArray[np.int32]:
    """Decode by other means than the product's; the stored values, with their sign."""
    from PIL import Image

    header = _header(file.data)
    stored, shape = header.BitsStored, (header.Rows, header.Columns)
    if file.transfer_syntax in NATIVE:
        width = "<u1" if header.BitsAllocated == 8 else "<u2"
        values = np.frombuffer(header.PixelData, width, count=shape[0] * shape[1]).reshape(shape)
    elif file.transfer_syntax == RLELossless:
        found, _ = get_decoder(RLELossless).as_array(header, decoding_plugin="pydicom")
        values = found
    else:
        frame = get_frame(header.PixelData, 0, number_of_frames=1)
        if frame.startswith(b"\xff\x4f"):
            # Pillow spreads the samples over 16 bits, and shows signed ones from zero on.
            precision, signed = (frame[42] & 0x7F) + 1, bool(frame[42] & 0x80)
            values = np.asarray(Image.open(io.BytesIO(frame))).astype(np.int32) >> 16 - precision
            if signed:
                values, stored = values - (1 << precision - 1), precision
        else:
            values = imagecodecs.jpegls_decode(frame)
    kept = values.astype(np.int32) & ((1 << stored) - 1)
    if header.PixelRepresentation:
        kept = (kept ^ 1 << stored - 1) - (1 << stored - 1)
    return kept


def _fingerprint(file: Bundled, stored: NDArray[np.int32]) -> str:
    """What the product says of an image whose stored values are these."""
    header = _header(file.data)
    dtype = "<i2" if stored.min() < 0 else "<u2"
    said = f"{header.PhotometricInterpretation}/{header.Rows}x{header.Columns}/{dtype}/".encode()
    return hashlib.sha256(said + stored.astype(dtype).tobytes()).hexdigest()


def test_the_page_tells_what_becomes_of_them(files: list[Bundled]) -> None:
    page = bundled_files.PAGE.read_text()
    assert page == fill(page, tables(files)), "run: python tests/support/bundled_files.py"


def test_all_files_are_there(files: list[Bundled]) -> None:
    assert len(files) >= 200
    assert sum(not isinstance(file.end, Reject) for file in files) >= 31
    # What is refused for its class was not refused for its form: a decoder could have had it.
    accepted = {file.transfer_syntax for file in files if not isinstance(file.end, Reject)}
    assert accepted >= {
        *NATIVE,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
        JPEG2000,
    }


def test_accepted_pixels_are_those_of_another_decoder(files: list[Bundled]) -> None:
    wrong = []
    for file in files:
        if isinstance(file.end, Reject):
            continue
        facts, image = file.end
        checked = acceptance.precheck(file.data, bundled_files.SPEC.modalities)
        layout = checked.tags.layout
        stored = decode(checked.pixels, checked.transfer_syntax, layout)
        reference = _by_another(file)
        apart = int(np.abs(stored - reference).max())
        lossy = TRANSFER_SYNTAXES[file.transfer_syntax].lossy
        if apart > lossy:
            wrong.append((file.path.name, apart))
        # The worker's answer, from the reference's pixels where there is one right answer.
        if lossy:
            reference = stored
        shown = preprocess(reference, layout, checked.tags.grayscale, bundled_files.SPEC)
        if facts.pixels != _fingerprint(file, reference) or not np.array_equal(image, shown):
            wrong.append((file.path.name, -1))
    assert wrong == []


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_implicit.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_jp2klossless.dcm",
    ],
)
def test_one_image_in_every_form_is_one_image(files: list[Bundled], name: str) -> None:
    plain, other = _named(files, "MR_small.dcm").end, _named(files, name).end
    assert not isinstance(plain, Reject)
    assert not isinstance(other, Reject)
    assert other[0].pixels == plain[0].pixels
    assert np.array_equal(other[1], plain[1])
    assert plain[1].std() > 5000


@pytest.mark.parametrize(
    "name", ["JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "JPEG2000.dcm"]
)
def test_files_of_other_classes_would_be_read_right(files: list[Bundled], name: str) -> None:
    """Refused for what they show, yet good answers for the decoders."""
    file = _named(files, name)
    assert file.end in {Reject.MODALITY, Reject.CAPTURE}
    parts = structure.dissect(file.data, WANTED, TRANSFER_SYNTAXES.keys())
    layout = parse_tags(parts.header, parts.implicit).layout
    assert parts.pixels is not None
    check_codestream(parts.pixels, parts.transfer_syntax, layout)
    stored = decode(parts.pixels, parts.transfer_syntax, layout)
    assert np.abs(stored - _by_another(file)).max() <= 1
    assert stored.max() > stored.min()
