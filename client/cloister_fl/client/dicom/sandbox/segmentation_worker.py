"""A worker that reads segmentations besides images; see ``worker``.

A module of its own, for studies that segment: others need not load highdicom.
"""

from __future__ import annotations

from typing import NoReturn

from cloister_fl.client.dicom.sandbox.worker import enter, serve


def main() -> NoReturn:
    """Serve until the parent is gone."""
    serve(*enter(), segmentations=True)
