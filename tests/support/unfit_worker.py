"""A worker whose JPEG-LS decoder answers wrongly; started by name, never imported."""

from __future__ import annotations

from typing import NoReturn

from cloister_fl.client.dicom.sandbox import worker


def main() -> NoReturn:
    # Taken first, so that what is loaded here is loaded with limits.
    numbers = worker.enter()
    from cloister_fl.client.dicom.pixels.decoders import DECODERS
    from cloister_fl.client.dicom.transfer_syntaxes import JPEG_LS

    right = DECODERS[JPEG_LS]
    DECODERS[JPEG_LS] = lambda data, frame: right(data, frame) + 9
    worker.serve(*numbers)
