"""Silencing of libraries whose log records would quote patients' data."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

LIBRARIES = ("pydicom", "pynetdicom", "httpx", "httpcore")
"""Their records quote values of elements, UIDs of studies, and addresses of archives."""


def silence_libraries() -> None:
    """Drop all log records of ``LIBRARIES``, whatever the program's set-up, for good.

    For the ``main`` of a process of ours: a module that is imported leaves its host's logging
    as it is. A program that reads an archive through our modules calls it itself.
    """
    for name in LIBRARIES:
        log = logging.getLogger(name)
        log.addHandler(logging.NullHandler())
        log.propagate = False
        log.setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def libraries_silenced() -> Iterator[None]:
    """Drop the log records of ``LIBRARIES`` for as long as the context lasts.

    For functions that a host program calls: it finds its logging as it was. Contexts may overlap,
    also in several threads; the last to end puts the set-up back.
    """
    _silences.enter()
    try:
        yield
    finally:
        _silences.leave()


class _Silences:
    """Counts overlapping contexts, and keeps the set-up that the first of them found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._found: dict[str, tuple[int, bool, list[logging.Handler]]] = {}

    def enter(self) -> None:
        with self._lock:
            if not self._open:
                logs = [logging.getLogger(name) for name in LIBRARIES]
                self._found = {
                    log.name: (log.level, log.propagate, list(log.handlers)) for log in logs
                }
                silence_libraries()
            self._open += 1

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                for name, (level, propagate, handlers) in self._found.items():
                    log = logging.getLogger(name)
                    log.setLevel(level)
                    log.propagate, log.handlers = propagate, handlers


_silences = _Silences()
