"""What all tests share."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# A shell's job in the background ignores interrupts, and hands that on to every process.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: the tests' networks are tiny, and two threads on them only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test leaves a word on the machine about the ledgers that it made.
os.environ["CLOISTER_STATE"] = "none"


@pytest.fixture
def silenced() -> Iterator[None]:
    """Libraries' logs as in a process of ours, for tests that call what its ``main`` calls."""
    from cloister_fl.system.libraries.logs import LIBRARIES, silence_libraries

    logs = [logging.getLogger(name) for name in LIBRARIES]
    before = [(log.level, log.propagate, list(log.handlers)) for log in logs]
    silence_libraries()
    yield
    for log, (level, propagate, handlers) in zip(logs, before, strict=True):
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test runs find a person who can be asked."""
    import click.testing

    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch, for a file whose tensors are tiny.

    They gain nothing from threads, and lose much where the cores are shared.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """Mark the unit tests; begin with folders whose files take minutes, so that none ends alone."""
    first = {"e2e": 0, "integration": 1}
    items.sort(key=lambda item: first.get(item.path.parent.name, 2))
    for item in items:
        if item.path.is_relative_to(UNIT):
            item.add_marker("unit")


UNIT = Path(__file__).parent / "unit"
# Fewer examples for scripts/check; scripts/test draws as many as each test asks for.
settings.register_profile("quick", max_examples=20)
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
started: list[str] = []


def _note_start(event: str, _: tuple[object, ...]) -> None:
    if event in STARTS:
        started.append(event)


sys.addaudithook(_note_start)


def _watch_workers() -> None:
    """Count a file for the workers as a start: only the first test that has one starts them."""
    module = sys.modules.get("cloister_fl.client.dicom.sandbox.pool")
    if module is None or hasattr(module.Pool.submit, "__wrapped__"):
        return
    submit = module.Pool.submit

    @functools.wraps(submit)
    def counted(*given: Any, **named: Any) -> Any:
        started.append("a DICOM worker")
        return submit(*given, **named)

    module.Pool.submit = counted


@pytest.fixture(autouse=True)
def _no_signal_handler_left_behind() -> Iterator[None]:
    """A test that leaves a handler of its own changes what an interrupt does in those after it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler, left in zip(numbers, before, after, strict=True):
        if left is not handler:
            signal.signal(number, handler)
            pytest.fail(f"It left a handler of {number.name} behind.")


@pytest.fixture(autouse=True)
def _no_process_without_a_mark(request: pytest.FixtureRequest) -> Iterator[None]:
    """What ``scripts/check`` runs starts no process: then it is quick, and the same everywhere."""
    marks = {mark.name for mark in request.node.iter_markers()}
    _watch_workers()
    before = len(started)
    yield
    if "unit" in marks and not marks & {"process", "slow"} and len(started) > before:
        pytest.fail(f"It started a process ({started[-1]}): mark it with pytest.mark.process.")
