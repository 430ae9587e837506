"""Health of a service in a file: what is told, of a process that lives, hangs or is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister_fl.system import health
from cloister_fl.system.health import LATE_S, Health, boot, told_in


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "health"


def _written(file: Path, state: str, *, ago: float = 0.0, of: str = "") -> str:
    file.write_text(f"{state} {of or boot()} {time.monotonic() - ago:.0f}".ljust(128))
    return told_in(file)


def test_a_service_that_serves_says_so_until_it_ends(file: Path) -> None:
    service = Health("127.0.0.1:0", file)
    assert told_in(file) == "not serving"
    service.serving(True)
    assert told_in(file) == "serving"
    assert file.stat().st_mode & 0o777 == 0o600
    service.close()
    assert told_in(file) == "not serving"


def test_a_service_that_hangs_or_was_killed_is_not_taken_for_one_that_serves(file: Path) -> None:
    assert _written(file, "serving", ago=LATE_S - 5) == "serving"
    assert "last heard" in _written(file, "serving", ago=LATE_S + 5)


def test_what_was_said_before_the_machine_started_anew_counts_nothing(file: Path) -> None:
    assert "since the machine started" in _written(file, "serving", of="another-boot")
    assert "since the machine started" in _written(file, "serving", ago=-1000)


@pytest.mark.parametrize("held", [b"", b"serving", b"\xff" * 200, b"serving x y", b"serving - nan"])
def test_a_file_that_is_damaged_is_no_word_of_a_service(file: Path, held: bytes) -> None:
    file.write_bytes(held)
    assert told_in(file).startswith("not serving")
    file.unlink()
    assert told_in(file).startswith("not serving")


def test_the_file_is_written_when_something_changes_and_now_and_then(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Health("127.0.0.1:0", file)
    now = time.monotonic()
    monkeypatch.setattr(health, "monotonic", lambda: now)
    service.serving(True)
    first = file.read_bytes()
    now += health.BEAT_S / 2
    service.serving(True)
    assert file.read_bytes() == first
    now += health.BEAT_S
    service.serving(True)
    assert file.read_bytes() != first
    service.close()


@pytest.mark.process
def test_a_health_check_starts_no_library(file: Path) -> None:
    _written(file, "serving")
    code = (
        "import sys; before = set(sys.modules); import cloister_fl.system.health as h;"
        "print(h.told_in(sys.argv[1]), *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    told, *modules = done.stdout.split()
    assert told == "serving"
    assert [one for one in modules if not one.startswith("cloister_fl")] in ([], ["__future__"])
    asked = [sys.executable, "-I", "-m", "cloister_fl.system.health", str(file)]
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 0
    _written(file, "not-serving")
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 1
