"""A worker whose JPEG-LS decoder answers wrongly; started by name, never imported."""

from __future__ import annotations

from typing import NoReturn

from cloister_client.dicom import worker


def main() -> NoReturn:
    # Taken first, so that what is loaded here is loaded with limits.
    numbers = worker.enter()
    from cloister_client.dicom import decode, precheck

    right = decode._DECODERS[precheck.JPEG_LS_LOSSLESS]
    decode._DECODERS[precheck.JPEG_LS_LOSSLESS] = lambda data: right(data) + 9
    worker.serve(*numbers)
