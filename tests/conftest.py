"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: the tests' networks are tiny, and two threads on them only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together, where tests run side by side, what shares fixtures that take long to make.

    The tests with real processes share one federation, and measure time: one at a time.
    """
    for item in items:
        file = Path(item.nodeid.partition("::")[0])
        item.add_marker(pytest.mark.xdist_group("e2e" if "e2e" in file.parts else str(file)))
