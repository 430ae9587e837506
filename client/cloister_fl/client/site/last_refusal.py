"""Last refusal of a site, for its own operator; the coordinator gets a coarse reason only."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from cloister_fl.errors import CloisterError, OutputInTheWay
from cloister_fl.system import utc
from cloister_fl.system.files import write_atomic

FILE = "notice.json"


@dataclass(frozen=True)
class LastRefusal:
    """The last refusal: error code, its message (never a patient's data), and when."""

    code: str
    message: str
    time: str


def keep_last_refusal(root: Path, error: CloisterError) -> None:
    """Store this error as the site's last refusal; where it cannot be written, there is none.

    It raises nothing: a full disk must not change the site's answer.
    """
    now = utc.timestamp()
    note = {"code": error.code, "message": str(error), "time": now}
    try:
        write_atomic(root / FILE, json.dumps(note, indent=1).encode())
    except OutputInTheWay:
        with contextlib.suppress(OSError):
            clear_last_refusal(root)


def read_last_refusal(root: Path) -> LastRefusal | None:
    """Return the site's last refusal, or None where there is none."""
    try:
        note = json.loads((root / FILE).read_text("utf-8"))
        return LastRefusal(str(note["code"]), str(note["message"]), str(note["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear_last_refusal(root: Path) -> None:
    """Remove the last refusal: the site has accepted a request since."""
    (root / FILE).unlink(missing_ok=True)
