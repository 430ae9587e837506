"""One service a folder, however often others ask whether it runs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloister_fl.errors import OutputInTheWay, ServiceState
from cloister_fl.system.pid_lock import holder, only_one
from support.errors import raises

pytestmark = pytest.mark.process


HOLD = """
import sys, pathlib
from cloister_fl.system.pid_lock import only_one
with only_one(pathlib.Path(sys.argv[1]), RuntimeError):
    print("held", flush=True)
    sys.stdin.read()
"""


def _taken() -> Exception:
    return ServiceState("It runs already.")


def test_the_holder_is_named_and_nobody_else_gets_in(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert holder(lock) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert holder(lock) == process.pid
        with raises(ServiceState, match="runs already"), only_one(lock, _taken):
            pass
        process.kill()
        process.wait()
    assert holder(lock) is None


def test_asking_who_runs_keeps_nobody_from_starting(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            assert holder(lock) in {None, os.getpid()}

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(300):
            with only_one(lock, _taken):
                assert holder(lock) == os.getpid()
    finally:
        done.set()
        for thread in asking:
            thread.join()


def test_a_lock_that_cannot_be_made_is_an_error_with_a_number(tmp_path: Path) -> None:
    """As on a file system that is read-only; it was an internal error (OSError)."""
    lock = tmp_path / "missing" / "lock"
    with raises(OutputInTheWay, match="lock cannot be written"), only_one(lock, _taken):
        raise AssertionError


def test_who_runs_is_known_on_a_file_system_that_became_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` said of a service that ran that it does not run, and `stop` did not end it."""
    lock, real = tmp_path / "lock", os.open

    def opened(path: Path, flags: int, *more: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more)

    with only_one(lock, _taken):
        monkeypatch.setattr(os, "open", opened)
        assert holder(lock) == os.getpid()
