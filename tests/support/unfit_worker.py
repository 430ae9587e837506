"""A worker whose JPEG-LS decoder answers wrongly; started by name, never imported."""

from __future__ import annotations

from typing import NoReturn

from cloister_fl.client.dicom.sandbox import worker


def main() -> NoReturn:
    # Taken first, so that what is loaded here is loaded with limits.
    numbers = worker.enter()
    from cloister_fl.client.dicom import acceptance
    from cloister_fl.client.dicom.pixels import decoders

    right = decoders._DECODERS[acceptance.JPEG_LS_LOSSLESS]
    decoders._DECODERS[acceptance.JPEG_LS_LOSSLESS] = lambda data: right(data) + 9
    worker.serve(*numbers)
