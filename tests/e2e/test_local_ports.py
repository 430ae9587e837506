"""Which ports the processes of a federation open, and what another account could take of them."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from pathlib import Path

import pytest

from cloister_fl.client.flower.names import RUN, SOCKET
from support.coordinator_process import wait_for
from support.deployment import Deployment, descendants


def _listening() -> dict[str, int]:
    """Ports on which this machine listens, by the number of the socket."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def ports_of(pid: int) -> set[int]:
    """Ports on which a process and all below it listen."""
    listening, found = _listening(), set()
    for each in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{each}/fd").iterdir():
                with contextlib.suppress(OSError):
                    number = str(handle.readlink()).removeprefix("socket:[").removesuffix("]")
                    if number in listening:
                        found.add(listening[number])
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_no_port_is_open_that_carries_authority(three: Deployment) -> None:
    for hospital in three.hospitals.values():
        assert hospital.process is not None
        hospital.wait()
        assert ports_of(hospital.process.pid) == {_port(hospital.standing()["health"])}
    file = three.place.file
    public = {_port(file.fleet.listen), _port(file.enrolment.listen)}
    # The enrolment port is open only while an invite is.
    found = ports_of(three.server.process.pid) - public
    assert found == {_port(file.private.health)}


@pytest.mark.slow
def test_a_node_that_was_killed_comes_back_on_its_socket_and_opens_no_port(
    three: Deployment,
) -> None:
    hospital = next(iter(three.hospitals.values()))
    assert hospital.process is not None
    hospital.wait()
    place = hospital.folder / RUN / SOCKET
    before = place.lstat()
    os.kill(hospital.children()["node"], signal.SIGKILL)
    wait_for(lambda: not hospital.standing().get("serving"), 20, hospital.told)
    # What is left in its place is in a folder that no other account can enter.
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    hospital.wait()
    after = place.lstat()
    assert stat.S_ISSOCK(after.st_mode)
    assert (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
    assert ports_of(hospital.process.pid) == {_port(hospital.standing()["health"])}
