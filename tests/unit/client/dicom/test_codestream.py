"""The size check of codestreams, and the transfer syntaxes that it knows."""

from __future__ import annotations

import pytest
from pydicom.uid import JPEG2000Lossless

from cloister_fl.client.dicom.codestream import Frame, check_codestream, read_frame
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels.decoders import check_decoder, decode
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from support.dicom import encode, radiograph, sample

UNLISTED = (
    "1.2.840.10008.1.2.4.92",  # JPEG 2000 of several components, lossless
    "1.2.840.10008.1.2.4.110",  # JPEG XL, lossless
    "1.2.840.10008.1.2.1.99",  # deflated
    "",
)
LAYOUT = PixelLayout(48, 40, 16, 12, 11, False)


@pytest.mark.parametrize("transfer_syntax", sorted(TRANSFER_SYNTAXES.keys() - NATIVE))
def test_the_frame_header_of_every_encoded_syntax_is_read(transfer_syntax: str) -> None:
    pixels, bits = sample(transfer_syntax)
    frame = encode(pixels, transfer_syntax, bits)
    layout = PixelLayout(48, 40, 8 * pixels.itemsize, bits, bits - 1, False)
    found = read_frame(frame, transfer_syntax, layout)
    assert (found.rows, found.columns) == (48, 40)
    assert bits <= found.precision <= layout.bits_allocated


@pytest.mark.parametrize("transfer_syntax", UNLISTED)
def test_an_unlisted_syntax_is_not_read_as_jpeg_2000(transfer_syntax: str) -> None:
    frame = encode(radiograph(), JPEG2000Lossless, 12)
    assert read_frame(frame, JPEG2000Lossless, LAYOUT) == Frame(48, 40, 12)
    for refuse in (
        lambda: read_frame(frame, transfer_syntax, LAYOUT),
        lambda: check_codestream(frame, transfer_syntax, LAYOUT),
        lambda: check_decoder(transfer_syntax),
        lambda: decode(frame, transfer_syntax, LAYOUT),
    ):
        with pytest.raises(RejectedFile) as caught:
            refuse()
        assert caught.value.reason is Reject.TRANSFER_SYNTAX


@pytest.mark.parametrize("transfer_syntax", UNLISTED)
def test_no_frame_is_encoded_in_a_syntax_that_the_tests_do_not_know(transfer_syntax: str) -> None:
    with pytest.raises(ValueError, match="no encoder for transfer syntax"):
        encode(radiograph(), transfer_syntax, 12)
