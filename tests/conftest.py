"""What all tests share."""

from __future__ import annotations

import os

# Before torch is imported: the tests' networks are tiny, and two threads on them only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
