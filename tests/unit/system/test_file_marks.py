"""Marks of files: whatever changes a file gives it another one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister_fl.system.files import Mark, mark_of, write_atomic


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"X")


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"X")


def replaced(path: Path) -> None:
    write_atomic(path, b"xyz")


def wider(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize("change", [written_over, longer, replaced, wider])
def test_a_change_whose_times_are_set_back_shows(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"abc")
    before, times = mark_of(path), path.stat()
    assert mark_of(path) == before
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert mark_of(path) != before


def test_what_a_mark_holds(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abc")
    other.write_bytes(b"abcd")
    about = one.stat()
    times = (about.st_mtime_ns, about.st_ctime_ns)
    assert mark_of(one) == Mark(about.st_dev, about.st_ino, 3, *times)
    found = mark_of(other)
    assert found is not None
    assert (found.inode, found.size) == (other.stat().st_ino, 4)
    with one.open("rb") as file:
        assert mark_of(file.fileno()) == mark_of(one)


def test_a_link_has_its_own_mark_and_nothing_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert mark_of(tmp_path / "link") not in {None, mark_of(tmp_path / "file")}
    assert mark_of(tmp_path / "none") is None
