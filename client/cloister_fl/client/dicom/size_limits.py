"""Size limits shared by the process with the data and the processes that read files.

Kept apart from the readers, so that the first need not load what only the second use.
"""

from __future__ import annotations

MAX_FILE_BYTES = 256 << 20
"""Largest file that is read; a 64-megapixel 16-bit image and its header fit."""

MAX_PIXELS = 64 << 20
"""Most pixels of an image (rows x columns); the largest mammograms have half of it."""

MAX_SIDE = 1024
"""Largest side of a preprocessed image; the study's own bound."""

MAX_OUT_BYTES = 32 << 20
"""Most bytes that are made of one file: an image has 2 MiB, 1,000 masks of side 512 have 32."""

MAX_KEY_BYTES = 1024
"""Longest identifier in UTF-8; the standard allows 64 characters, archives some more."""

CPU_SECONDS = 20
"""How long one file may compute. It decides whether a file is read, for it depends on no other
file, nor on how busy the machine is."""

WALL_SECONDS = 300.0
"""How long a worker is waited for by the clock: only one that sleeps, or a machine with far more
work than cores, needs it."""

ADDRESS_SPACE_BYTES = 2 << 30
"""How much memory a worker may map, its libraries included (about 200 MB)."""
