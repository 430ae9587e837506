"""A service that is started before the coordinator has approved the site."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cloister_fl.client.network.join import CERTIFICATE
from support import coordinator_process
from support.coordinator_process import wait_for
from support.deployment import Hospital, cloister


@pytest.mark.slow
def test_start_waits_for_the_approval_and_then_serves(tmp_path: Path) -> None:
    place = coordinator_process.new_coordinator(tmp_path / "fed")
    server = coordinator_process.start(place, tmp_path / "server.log")
    hospital = Hospital(tmp_path / "north")
    where = ("--dir", hospital.folder)
    try:
        cloister("server", "invite", "north", "--dir", place.root)
        told = cloister("client", "join", place.root / "invites" / "north.invite", *where)
        mark = re.search(r"^  ([0-9a-f ]+)$", told, re.M)
        assert mark is not None, told
        hospital.start(wait=False)
        wait_for(
            lambda: "not approved this site yet" in str(hospital.standing().get("why")),
            60,
            hospital.told,
        )
        # It is there, it is no fault of its own, and nothing of a study runs in it yet.
        told = cloister("client", "status", *where, status=9)
        assert "not serving; the coordinator has not approved this site yet" in told
        assert hospital.children() == {}
        cloister("client", "stop", *where)
        assert hospital.process is not None
        assert hospital.process.wait(10) == 0
        hospital.start(wait=False)
        # The server's end is no reason to give up.
        server.stop()
        wait_for(lambda: "cannot be reached" in hospital.told(), 60, hospital.told)
        server = coordinator_process.start(place, tmp_path / "server.log")
        cloister("server", "approve", "north", "--fingerprint", mark[1], "--dir", place.root)
        hospital.wait()
        assert (hospital.folder / "keys" / CERTIFICATE).exists()
        assert "The coordinator has approved this site." in hospital.told()
        assert json.loads(cloister("client", "status", "--json", *where))["serving"] is True
    finally:
        hospital.stop()
        server.stop()
