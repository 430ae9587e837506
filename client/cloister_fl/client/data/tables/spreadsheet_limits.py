"""Sizes of a spreadsheet, on both sides of the process that parses it."""

from __future__ import annotations

MAX_BYTES = 64 << 20
"""Largest file."""
MAX_CELL = 1 << 16
"""Characters of a cell that are told."""
MAX_TOLD = 256 << 20
"""Most that is taken of what the process tells."""
SECONDS = 120.0
"""How long it may take, by the clock."""
