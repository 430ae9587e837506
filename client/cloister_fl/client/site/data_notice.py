"""Notices on the data of studies, for the site's own people; nothing of them is sent.

A run with privacy answers whatever the data are, so the answer tells nobody that images of a study
are missing, changed or unreadable. Here the site says it to those who can mend it. It is not said
in the audit log: that log's head travels with each answer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cloister_fl.errors import CloisterError, OutputInTheWay
from cloister_fl.system import utc
from cloister_fl.system.files import locked, write_atomic

FILE = "data.json"
_FORMAT = 1


@dataclass(frozen=True)
class DataNotice:
    """What is wrong with the data of a study: error code, its message, and when it was found.

    Attributes:
        lasts: whether it stays until a person looks at the data, as what failed in training does;
            another goes with the next reading that finds nothing.
    """

    code: str
    message: str
    time: str
    lasts: bool = False


def note_data(
    root: Path, study: str, faults: Sequence[CloisterError], *, lasts: bool = False
) -> None:
    """Keep the first fault that a run met in the data of a study; or, where it met none, forget
    what does not last.

    It raises nothing: whether it can be written must not change what the site answers.

    Args:
        root: the site folder.
        study: the study's hash.
        faults: what is wrong, in the order in which to mend it.
        lasts: see ``DataNotice``.
    """
    _note(root, study, faults, lasts=lasts, all_gone=False)


def note_look(root: Path, study: str, faults: Sequence[CloisterError] = ()) -> None:
    """Keep what a person found who looked at the data of a study, in place of all from before."""
    _note(root, study, faults, lasts=False, all_gone=True)


def _note(
    root: Path, study: str, faults: Sequence[CloisterError], *, lasts: bool, all_gone: bool
) -> None:
    with contextlib.suppress(OSError, OutputInTheWay), locked(root / f".{FILE}.lock"):
        known = data_notices(root)
        before = known.pop(study, None)
        if faults:
            new = DataNotice(faults[0].code, str(faults[0]), utc.timestamp(), lasts)
            if before is not None and replace(before, time=new.time) == new:
                return
            known[study] = new
        elif before is None or (before.lasts and not all_gone):
            return
        rows = {digest: asdict(one) for digest, one in known.items()}
        text = json.dumps({"format": _FORMAT, "studies": rows}, indent=1)
        write_atomic(root / FILE, text.encode())


def data_notices(root: Path) -> dict[str, DataNotice]:
    """All notices by the study's hash; none where they cannot be read."""
    try:
        told = json.loads((root / FILE).read_text("utf-8"))
        if told["format"] != _FORMAT:
            return {}
        return {
            str(digest): DataNotice(
                str(one["code"]), str(one["message"]), str(one["time"]), bool(one["lasts"])
            )
            for digest, one in told["studies"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
