"""Why the site last said no, for its own operator; the coordinator gets a coarse reason only."""

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
class Notice:
    """The last refusal: error code, its message (never a patient's data), and when."""

    code: str
    message: str
    time: str


def leave_notice(root: Path, error: CloisterError) -> None:
    """Replace the site's notice by this error; where it cannot be written, there is none.

    It raises nothing: what a full disk does to the notice must not become the site's answer.
    """
    now = utc.timestamp()
    note = {"code": error.code, "message": str(error), "time": now}
    try:
        write_atomic(root / FILE, json.dumps(note, indent=1).encode())
    except OutputInTheWay:
        with contextlib.suppress(OSError):
            clear_notice(root)


def read_notice(root: Path) -> Notice | None:
    """Return the site's notice, or None where there is none."""
    try:
        note = json.loads((root / FILE).read_text("utf-8"))
        return Notice(str(note["code"]), str(note["message"]), str(note["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear_notice(root: Path) -> None:
    """Forget the notice: the site has since said yes."""
    (root / FILE).unlink(missing_ok=True)
