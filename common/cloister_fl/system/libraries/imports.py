"""Imports of libraries that set up more than themselves when they are imported.

flwr gives itself log handlers and a variable of the environment, and draws a random number; Opacus
gives a handler to the root logger, and so to whoever imports it; MONAI sets variables of CUDA; Ray
shows exceptions its own way; several add filters of warnings. In a command that is of no matter. A
notebook or another program that calls us would find its logging, its environment or its random
numbers changed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import TypeAlias

FLOWER = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Variables that Flower reads when it is imported: no telemetry, no call to its update server."""

_SetUp: TypeAlias = tuple[int, bool, list[logging.Handler]]

_UNTOUCHED: _SetUp = (logging.NOTSET, True, [])
_lock = threading.RLock()


@contextlib.contextmanager
def undisturbed_imports() -> Iterator[None]:
    """Import libraries, and leave logging, environment, filters of warnings and random numbers as
    they were.

    A library that is imported for the first time keeps no handler and no level of its own: its
    records go where the program's other records go. Flower sees the variables of ``FLOWER``.

    The context is for import statements and nothing that takes longer: what another thread sets
    up meanwhile is undone, too. An interrupt (SIGINT) comes at its end: a library that was
    imported in half cannot be used in this process any more.
    """
    with _lock, _interrupts_later():
        environment, logs = dict(os.environ), _set_ups()
        drawn, hook = random.getstate(), sys.excepthook
        for name, value in FLOWER.items():
            os.environ.setdefault(name, value)
        try:
            # Puts the filters back; what a finder of modules adds stays, for it may be needed.
            with warnings.catch_warnings():
                yield
        finally:
            random.setstate(drawn)
            sys.excepthook = hook
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            for name, found in _set_ups().items():
                before = logs.get(name, _UNTOUCHED)
                if found != before:
                    _put_back(name, before)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        # Another thread is not interrupted.
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[-1])


def _set_ups() -> dict[str, _SetUp]:
    """Level, propagation and handlers of every logger; that of the root has the name ''."""
    known = dict(logging.root.manager.loggerDict)
    logs = {name: log for name, log in known.items() if isinstance(log, logging.Logger)}
    return {
        name: (log.level, log.propagate, list(log.handlers))
        for name, log in {"": logging.root, **logs}.items()
    }


def _put_back(name: str, before: _SetUp) -> None:
    log = logging.getLogger(name)
    level, log.propagate, handlers = before
    log.setLevel(level)
    log.handlers = list(handlers)
