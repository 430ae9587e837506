"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: the tests' networks are tiny, and two threads on them only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def silenced() -> Iterator[None]:
    """Libraries' logs as in a process of ours, for tests that call what its ``main`` calls."""
    from cloister_fl.system.library_logs import LIBRARIES, silence_libraries

    logs = [logging.getLogger(name) for name in LIBRARIES]
    before = [(log.level, log.propagate, list(log.handlers)) for log in logs]
    silence_libraries()
    yield
    for log, (level, propagate, handlers) in zip(logs, before, strict=True):
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


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
