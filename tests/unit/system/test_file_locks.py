"""Locks between processes: one holder at a time, and none left by a dead one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloister_fl.system.files import locked, try_lock, unlock

pytestmark = pytest.mark.process


HOLD = """
import sys, pathlib
from cloister_fl.system.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_keeps_it_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(RuntimeError, match="taken"),
            locked(path, lambda: RuntimeError("taken")),
        ):
            pass
        process.kill()
        process.wait()
    with locked(path, lambda: RuntimeError("taken")) as handle:
        assert os.fstat(handle).st_ino == path.stat().st_ino


def test_without_another_word_it_is_waited_for(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()

    def second() -> None:
        with locked(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path, lambda: RuntimeError("taken")):
        pass


def test_the_file_is_its_owners_alone_and_keeps_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as handle:
        os.write(handle, b"kept")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with locked(path):
        assert path.read_bytes() == b"kept"


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError) as caught, locked(tmp_path / "lock"):
        pass
    assert caught.value.errno == errno.ELOOP
    assert not (tmp_path / "elsewhere").exists()


def test_shared_holders_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    handles = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for _ in range(3)]
    first, second, third = handles
    assert try_lock(first, shared=True)
    assert try_lock(second, shared=True)
    assert not try_lock(third)
    unlock(first)
    unlock(second)
    assert try_lock(third)
    assert not try_lock(first, shared=True)
    for handle in handles:
        os.close(handle)
