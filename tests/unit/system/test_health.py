"""Health of a service in a file: what is told, of a process that lives, hangs or is gone."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloister_fl.errors import ListenRefused, OutputInTheWay
from cloister_fl.system import health
from cloister_fl.system.health import CONNECTIONS, LATE_S, Health, boot, healthy, told_in
from support.errors import raises


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "health"


def _written(file: Path, state: str, *, ago: float = 0.0, of: str = "") -> str:
    file.write_text(f"{state} {of or boot()} {time.monotonic() - ago:.0f}".ljust(128))
    return told_in(file)


def test_a_service_that_serves_says_so_until_it_ends(file: Path) -> None:
    service = Health("127.0.0.1:0", file, "health")
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
    service = Health("127.0.0.1:0", file, "health")
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


@pytest.fixture
def served(file: Path) -> Iterator[str]:
    service = Health("127.0.0.1:0", file, "health")
    service.serving(True)
    yield f"127.0.0.1:{service.port}"
    service.close()


def test_a_local_account_does_not_fill_the_memory_through_the_health_port(served: str) -> None:
    """Each watcher was kept, with a name of up to 4 MB, for as long as it liked."""
    with grpc.insecure_channel(served, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest
        for call, code in (
            (lambda: next(stub.Watch(asked(), timeout=5)), "UNIMPLEMENTED"),
            (lambda: next(stub.Watch(asked(service="x" * 300), timeout=5)), "RESOURCE_EXHAUSTED"),
            (lambda: stub.Check(asked(service="x" * 300), timeout=5), "RESOURCE_EXHAUSTED"),
            (lambda: stub.Check(asked(service="other"), timeout=5), "NOT_FOUND"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code().name == code
        assert stub.Check(asked(), timeout=5).status == 1


def _is_closed(line: socket.socket) -> bool:
    """Whether the other end closes it within a second; those that got a place stay open."""
    line.settimeout(1)
    try:
        while line.recv(64):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


def test_a_local_account_does_not_take_the_descriptors_through_the_health_port(served: str) -> None:
    """Who held a thousand connections left none of the process's 1,024 for its other ports."""
    assert healthy(served)
    with contextlib.ExitStack() as held:
        host, _, port = served.rpartition(":")
        lines = [
            held.enter_context(socket.create_connection((host, int(port)), timeout=5))
            for _ in range(4 * CONNECTIONS)
        ]
        # Which of them get a place is chance, and each is greeted before it is judged.
        kept = sum(not _is_closed(line) for line in lines)
        assert kept <= CONNECTIONS
    end = time.monotonic() + 10
    while not healthy(served) and time.monotonic() < end:
        time.sleep(0.05)
    assert healthy(served)


def test_a_port_that_is_taken_at_the_bind_itself_is_refused_in_words(file: Path) -> None:
    """Whoever took it after a look whether it was free had an OSError without a number raised."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with raises(ListenRefused, match=f"cannot listen on {address}") as caught:
            Health(address, file, "health in server.toml")
    assert caught.value.remedy == "Choose another: health in server.toml."


def test_a_health_file_that_cannot_be_made_is_not_taken_for_the_port(tmp_path: Path) -> None:
    with raises(OutputInTheWay, match="health cannot be written"):
        Health("127.0.0.1:0", tmp_path / "missing" / "health", "")
