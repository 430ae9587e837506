"""Process in which a spreadsheet is parsed, which it may crash or exhaust.

Started by ``spreadsheet`` in a clean interpreter; arguments are the parent's process id and the
sheet's name. It reads the file from its standard input and writes a row of cells a line, as JSON,
to its standard output, and at the end how it went. See ``dicom.sandbox.confinement`` for what it
may.
"""

from __future__ import annotations

import io
import json
import os
import sys
from datetime import datetime
from typing import NoReturn

from cloister_fl.client.data.tables.spreadsheet_limits import MAX_BYTES, MAX_CELL
from cloister_fl.client.dicom.sandbox.confinement import confine, seal


def main() -> NoReturn:
    """Answer for one file."""
    confine(int(sys.argv[1]))
    from python_calamine import CalamineWorkbook, PasswordError, WorksheetNotFound

    with os.fdopen(0, "rb", closefd=False) as file:
        data = file.read(MAX_BYTES + 1)
    out = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    name = sys.argv[2]
    seal()
    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(data))
        sheet = book.get_sheet_by_name(name) if name else book.get_sheet_by_index(0)
        for row in sheet.to_python(skip_empty_area=False):
            out.write(json.dumps([told(cell) for cell in row]) + "\n")
        ended = "done"
    except PasswordError:
        ended = "password"
    except WorksheetNotFound:
        ended = "sheet"
    except BaseException:
        # BaseException: extensions written in Rust raise panics outside of Exception.
        ended = "unreadable"
    out.write(json.dumps({"ended": ended}) + "\n")
    out.flush()
    os._exit(0)


def told(cell: object) -> str:
    """A cell as text: whole numbers without a fraction, as a person sees them."""
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return str(int(cell))
    if isinstance(cell, datetime) and (cell.hour, cell.minute, cell.second) == (0, 0, 0):
        cell = cell.date()
    # One that is cut is in no column that a study reads.
    return str(cell)[:MAX_CELL]
