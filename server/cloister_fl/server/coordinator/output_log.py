"""What the server's process writes to standard error: time, level, place in the code, site.

Libraries quote in their messages what a peer sent, newlines and codes for the terminal among it,
a megabyte at a time. Whoever reads a service's output takes each line for the server's own. So no
text of a library is shown: what it complains of is named by the place that complains, by a number
of Flower's closed list and by the type of an exception. Lines of one place and site are few, and
more are counted.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TextIO

from cloister_fl.server.coordinator.rejection_log import Allowance
from cloister_fl.system import utc

SITE: ContextVar[str] = ContextVar("cloister_site", default="")
"""Name of the enrolled site whose request is being answered; set by the gate."""

OWN = "cloister"
"""Logger of this package, whose messages are shown."""
LINES = 5
MINUTE_S = 60.0
"""Lines of one place and site in this many seconds; more are counted, in the next line."""
OWN_CHARACTERS = 500

_FLOWER = re.compile(r"\[(?:ApiError:(\d{1,6})|UnexpectedError:([A-Za-z]{1,60}))\]")
_FLOWER_HEAD = 120
"""Characters of one of Flower's messages in which its number stands, behind the path."""
_PLAIN = re.compile(r"[^\x20-\x7e\xa1-\u02ff]")


class OutputLog(logging.Handler):
    """Shows log records without what they quote.

    Args:
        stream: where to write; standard error at the time of the line, unless given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self._allowances: dict[tuple[str, str, int, str], Allowance] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or count one that is not shown."""
        site = SITE.get()
        key = (record.name, record.module, record.lineno, site)
        allowance = self._allowances.setdefault(key, Allowance(LINES, MINUTE_S))
        if not allowance.take():
            return
        parts = [utc.timestamp("milliseconds"), record.levelname, _told(record)]
        if site:
            parts.append(f"site={site}")
        if allowance.dropped:
            parts.append(f"not_shown={allowance.dropped}")
            allowance.dropped = 0
        print(" ".join(parts), file=self._stream or sys.stderr, flush=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Say nothing: logging would print the record, message and all."""


def install(libraries: Iterable[str] = ()) -> None:
    """Let nothing else write log records of this process.

    Args:
        libraries: loggers that have handlers of their own, which are taken from them.
    """
    root = logging.getLogger()
    for logger in (root, *map(logging.getLogger, libraries)):
        logger.handlers.clear()
        logger.propagate = True
    root.addHandler(OutputLog())
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    threading.excepthook = _thread_failed


def plain(text: str, most: int = OWN_CHARACTERS) -> str:
    """A text as one line that moves no cursor: at most so many characters, others as ``?``."""
    return _PLAIN.sub("?", text[:most])


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is not SystemExit:
        logging.getLogger(OWN).error("A thread failed: %s.", failed.exc_type.__name__)


def _told(record: logging.LogRecord) -> str:
    if record.name == OWN:
        return plain(record.getMessage())
    told = [f"{plain(record.name)} {plain(record.module)}:{record.lineno}"]
    # The head of the template alone: nothing that a peer sent is put together or looked at.
    found = _FLOWER.search(str(record.msg)[:_FLOWER_HEAD]) if record.name == "flwr" else None
    if found is not None:
        told.append(f"error={found[1] or found[2]}")
    if record.exc_info and record.exc_info[0] is not None:
        told.append(f"error={plain(record.exc_info[0].__name__, 60)}")
    return " ".join(told)
