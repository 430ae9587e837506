"""Rows of an Excel workbook (``.xlsx``), parsed in a process of its own.

Such a file is a ZIP of XML: what it unfolds to is not its size. The process that parses it has no
network, opens no other file, and ends with its memory or its time; it knows no key.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from cloister_fl.client.data.tables.csv_file import Invalid, read_bytes
from cloister_fl.client.data.tables.spreadsheet_limits import MAX_TOLD, SECONDS
from cloister_fl.client.site.label_settings import composed
from cloister_fl.system.module_path import path_of_children

_WORKER = "cloister_fl.client.data.tables.spreadsheet_worker"
# -I and -S: neither the environment nor the folder decides what is imported.
_OPTIONS = ("-I", "-S", "-B", "-X", "utf8", "-W", "ignore")
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    f"from importlib import import_module; import_module('{_WORKER}').main()"
)
_WHY = {
    "password": ("It is locked with a password.", "Save it without one."),
    "sheet": (
        "It has no sheet of that name.",
        "Correct 'sheet' below [data.labels] in site.toml; without it, the first sheet is read.",
    ),
    "unreadable": (
        "It is not a workbook of Excel (.xlsx), or it is damaged.",
        "Save it again, or as CSV.",
    ),
    "": (
        "Reading it took more than the memory or the time that one file is given.",
        "Save the sheet as CSV (UTF-8).",
    ),
}


def is_spreadsheet(path: Path) -> bool:
    """Whether a file is read as a workbook: by its name."""
    return path.suffix.casefold() == ".xlsx"


def rows_of_sheet(
    path: Path, sheet: str, what: str, setting: str, invalid: Invalid
) -> list[tuple[int, list[str]]]:
    """Read a sheet: each row's number, 1-based, and its stripped cells.

    Args:
        path: the workbook.
        sheet: name of the sheet; empty for the first.
        what, setting, invalid: as of ``csv_file.read_text``.

    Raises:
        DataError: of ``invalid``: it is too large, or no workbook that can be read.
    """
    data = read_bytes(path, what, setting, invalid)
    told = _told(data, sheet)
    rows: list[Any] = []
    ended = ""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        *lines, last = told.splitlines()
        ended = str(json.loads(last).get("ended", ""))
        rows = [json.loads(line) for line in lines]
    if ended != "done" or not all(isinstance(row, list) for row in rows):
        why, remedy = _WHY.get(ended, _WHY[""])
        raise invalid(f"The {what} cannot be read.", why=why, remedy=remedy)
    return [
        (number, [composed(str(cell)) for cell in row]) for number, row in enumerate(rows, start=1)
    ]


def _told(data: bytes, sheet: str) -> bytes:
    """What the process tells of a workbook; cut off where it tells too much or takes too long."""
    process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own code
        [sys.executable, *_OPTIONS, "-c", _START, str(os.getpid()), sheet, *path_of_children()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"MALLOC_ARENA_MAX": "1"},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        with contextlib.suppress(OSError), process.stdin:
            process.stdin.write(data)
        return process.stdout.read(MAX_TOLD)
    finally:
        timer.cancel()
        process.kill()
        process.stdout.close()
        process.wait()
