"""What all tests share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: the tests' networks are tiny, and two threads on them only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Keep together, where tests run side by side, what shares fixtures that take long to make.

    That is a file; and all tests with real processes, which share one federation and measure time.
    """
    from xdist.scheduler import LoadScopeScheduling

    # As collected, and not the scopes of most tests first: see below.
    config.option.loadscopereorder = False

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "e2e" if "/e2e/" in file else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders whose files take minutes, so that no worker ends with one alone."""
    first = {"e2e": 0, "server": 1}
    items.sort(key=lambda item: first.get(item.path.parent.name, 2))
