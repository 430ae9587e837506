"""Silencing of libraries whose log records would quote patients' data."""

from __future__ import annotations

import logging

LIBRARIES = ("pydicom", "pynetdicom", "httpx", "httpcore")
"""Their records quote values of elements, UIDs of studies, and addresses of archives."""


def silence_libraries() -> None:
    """Drop all log records of ``LIBRARIES``, whatever the program's set-up.

    For the ``main`` of a process of ours: a module that is imported leaves its host's logging
    as it is. A program that reads an archive through our modules calls it itself.
    """
    for name in LIBRARIES:
        log = logging.getLogger(name)
        log.addHandler(logging.NullHandler())
        log.propagate = False
        log.setLevel(logging.CRITICAL + 1)
