"""A site goes to another address of its coordinator, and to nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloister_fl.client.network import new_address
from cloister_fl.client.network.http import Answer, Cause, Failure, Step
from cloister_fl.client.network.join import membership
from cloister_fl.client.network.new_address import ADDRESS, take_address
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CoordinatorUnproven, OptionInvalid, RosterInvalid
from cloister_fl.server.coordinator.folder import Coordinator
from support.errors import raises
from support.renewals import FleetPort, copied, template


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("made"))


@pytest.fixture
def both(made: Path, tmp_path: Path) -> tuple[Coordinator, Site]:
    return copied(made, tmp_path)


def _logged(site: Site) -> list[str]:
    return [entry.kind for entry in entries_of(site)]


def test_the_coordinator_elsewhere(
    both: tuple[Coordinator, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, north = both
    asked: list[str] = []
    port = FleetPort(place, north)

    def dial(context: Any, method: str, address: str, *rest: Any, **named: Any) -> Any:
        asked.append(address)
        return port.dial(context, method, address, *rest, **named)

    monkeypatch.setattr(new_address, "dial", dial)
    before = membership(north)
    for _ in range(2):
        assert take_address(north, "fl.example.org:9000") == membership(north)
    assert asked == 2 * ["fl.example.org:9000"]
    new = {"fleet": "fl.example.org:9000", "enrolment": "fl.example.org:9001"}
    assert membership(north) == before.model_copy(update=new)
    assert _logged(north).count(ADDRESS) == 1
    take_address(north, "[::1]:9000", "[::1]:9443")
    assert (membership(north).fleet, membership(north).enrolment) == ("[::1]:9000", "[::1]:9443")


@pytest.mark.parametrize("address", ["fl.example.org", "fl.example.org:0", "a b:9443", ""])
def test_what_is_no_address(both: tuple[Coordinator, Site], address: str) -> None:
    with raises(OptionInvalid, match=r"is not HOST:PORT"):
        take_address(both[1], address)


def test_somebody_else_changes_nothing(
    both: tuple[Coordinator, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, north = both
    before = membership(north)
    stranger = Failure("198.51.100.1:9443", Step.TLS, Cause.UNTRUSTED)
    monkeypatch.setattr(new_address, "dial", lambda *_, **__: stranger)
    with raises(CoordinatorUnproven):
        take_address(north, "198.51.100.1:9443")
    other = Answer(200, b"not a signed roster", {}, "", 0.0, 0.0)
    monkeypatch.setattr(new_address, "dial", lambda *_, **__: other)
    with raises(RosterInvalid):
        take_address(north, "198.51.100.1:9443")
    assert membership(north) == before
    assert ADDRESS not in _logged(north)
