"""Imports that leave the program around them as it was."""

from __future__ import annotations

import importlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister_fl.system.libraries.imports import FLOWER, undisturbed_imports

RUDE = """
import logging, os, random, sys, warnings
SEEN = dict(os.environ)
DRAWN = random.random()
os.environ["RUDE_NEW"] = "1"
os.environ["RUDE_THERE"] = "changed"
os.environ.pop("RUDE_GONE")
logging.root.addHandler(logging.StreamHandler())
logging.root.setLevel(logging.DEBUG)
LOG = logging.getLogger("rude")
LOG.setLevel(logging.DEBUG)
LOG.addHandler(logging.StreamHandler())
LOG.propagate = False
OTHER = logging.getLogger("others")
OTHER.setLevel(logging.CRITICAL)
OTHER.handlers.clear()
sys.excepthook = lambda *_: None
warnings.filterwarnings("ignore", message="rude")
"""


@pytest.fixture
def rude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A library that changes whatever it can when it is imported; its name."""
    (tmp_path / "rude.py").write_text(RUDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RUDE_THERE", "as it was")
    monkeypatch.setenv("RUDE_GONE", "there")
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    yield "rude"
    sys.modules.pop("rude", None)


def test_logging_environment_random_numbers_and_hooks_are_as_they_were(rude: str) -> None:
    others = logging.getLogger("others")
    handler = logging.NullHandler()
    others.addHandler(handler)
    others.setLevel(logging.INFO)
    random.seed(7)
    environment, drawn, hook = dict(os.environ), random.getstate(), sys.excepthook
    root = (logging.root.level, list(logging.root.handlers))
    filters = list(warnings.filters)
    with undisturbed_imports():
        library = importlib.import_module(rude)
    assert dict(os.environ) == environment
    assert random.getstate() == drawn
    assert sys.excepthook is hook
    assert list(warnings.filters) == filters
    assert (logging.root.level, logging.root.handlers) == root
    assert (library.LOG.level, library.LOG.propagate, library.LOG.handlers) == (0, True, [])
    assert (others.level, others.handlers) == (logging.INFO, [handler])
    # Without the context the library does all of that: the test would see it.
    assert random.Random(7).random() == library.DRAWN
    others.removeHandler(handler)


def test_a_level_is_looked_up_anew(rude: str) -> None:
    """Loggers remember which levels are off; the memory must not outlive the level."""
    others = logging.getLogger("others")
    others.setLevel(logging.INFO)
    with undisturbed_imports():
        importlib.import_module(rude)
        assert not others.isEnabledFor(logging.INFO)
    assert others.isEnabledFor(logging.INFO)


def test_flower_is_told_to_keep_quiet_unless_the_host_says_otherwise(
    rude: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "0")
    with undisturbed_imports():
        seen = importlib.import_module(rude).SEEN
    assert FLOWER["FLWR_TELEMETRY_ENABLED"] == "0"
    assert seen["FLWR_TELEMETRY_ENABLED"] == "0"
    assert seen["FLWR_DISABLE_UPDATE_CHECK"] == "0"
    assert "FLWR_TELEMETRY_ENABLED" not in os.environ


def test_an_import_that_fails_leaves_no_trace_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "import os\nos.environ['RUDE_NEW'] = '1'\nraise ImportError"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError), undisturbed_imports():
        importlib.import_module("broken")
    assert "RUDE_NEW" not in os.environ


def test_an_interrupt_comes_when_the_imports_are_done() -> None:
    """A library imported in half cannot be used again in the process."""
    before = signal.getsignal(signal.SIGINT)
    done = []

    def interrupted() -> None:
        with undisturbed_imports():
            signal.raise_signal(signal.SIGINT)
            done.append("imported")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["imported"]
    assert signal.getsignal(signal.SIGINT) is before


def test_it_works_in_a_thread_where_no_signal_can_be_handled(rude: str) -> None:
    found = []

    def act() -> None:
        with undisturbed_imports():
            found.append(importlib.import_module(rude))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert len(found) == 1
    assert "RUDE_NEW" not in os.environ
