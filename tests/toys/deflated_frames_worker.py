"""A worker that reads deflated frames as well; started by name, never imported.

The product's workers know the product's table alone, and have no way to be told of another.
"""

from __future__ import annotations

from typing import NoReturn

from cloister_fl.client.dicom.sandbox import worker


def main() -> NoReturn:
    # Taken first, so that what is loaded here is loaded with limits.
    numbers = worker.enter()
    from toys.deflated_frames import PARTS

    for table, key, value in PARTS:
        table[key] = value
    worker.serve(*numbers)
