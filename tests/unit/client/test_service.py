"""The service renews the site's certificate by itself, quietly, and shows a renewed one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister_fl.client import service
from cloister_fl.client.network.join import MEMBERSHIP, membership
from cloister_fl.client.network.renewal import BEFORE
from cloister_fl.client.service import RENEW_S, RETRY_S, _Service
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CoordinatorUnreachable
from cloister_fl.membership.validity import RENEW_DAYS
from cloister_fl.server.coordinator.folder import Coordinator
from cloister_fl.system.files import write_atomic
from support.renewals import age_certificate, copied, template


@pytest.fixture(scope="module")
def template_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("made"))


@pytest.fixture
def both(template_of: Path, tmp_path: Path) -> tuple[Coordinator, Site]:
    return copied(template_of, tmp_path)


@pytest.fixture
def place(both: tuple[Coordinator, Site]) -> Coordinator:
    return both[0]


@pytest.fixture
def north(both: tuple[Coordinator, Site]) -> Site:
    (both[1].root / "run").mkdir(mode=0o700)
    return both[1]


class Node:
    stopped = 0

    def stop(self) -> None:
        self.stopped += 1


class Made:
    """A service that starts nothing, and what it did."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.called: list[str] = []
        self.error: Exception | None = None
        self.node = Node()
        quiet = SimpleNamespace(port=1, serving=lambda _: None)
        monkeypatch.setattr(service, "Health", lambda *_: quiet)
        for name in ("renew_certificate", "settle"):
            monkeypatch.setattr(service, name, lambda _, name=name: self._call(name))
        self.service: Any = _Service(site, self.said.append)
        self.service._children["node"] = self.node

    def _call(self, name: str) -> None:
        self.called.append(name)
        if self.error is not None:
            raise self.error

    def look(self) -> float:
        """One look at the certificate; in how many seconds the next one is."""
        import time

        self.service._renew()
        if self.service._renewal is not None:
            self.service._renewal.join(10)
        self.service._hear()
        return round(float(self.service._renews - time.monotonic()))


@pytest.fixture
def made(north: Site, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(north, monkeypatch)


@pytest.mark.parametrize(
    ("days", "called"),
    [
        (RENEW_DAYS + 1, []),
        (RENEW_DAYS - 1, ["renew_certificate"]),
        (0.5, ["renew_certificate"]),
        (-0.01, []),
    ],
)
def test_it_renews_from_sixty_days_before_the_end(
    place: Coordinator, north: Site, made: Made, days: float, called: list[str]
) -> None:
    age_certificate(place, north.root, days)
    assert made.look() == (RETRY_S if called else RENEW_S)
    assert made.called == called
    made.look()
    assert made.called == called  # once until it is time again


def test_what_fails_is_tried_again_and_said_nowhere(
    place: Coordinator, north: Site, made: Made
) -> None:
    age_certificate(place, north.root, 30)
    made.error = CoordinatorUnreachable("Nobody answers.")
    made.look()
    made.service._renews = 0.0
    made.error = None
    made.look()
    assert made.called == 2 * ["renew_certificate"]
    assert made.said == []


@pytest.mark.parametrize(("days", "called"), [(30, []), (6, ["renew_certificate"])])
def test_a_renewal_waits_for_the_end_of_a_round_but_not_without_end(
    place: Coordinator, north: Site, made: Made, days: float, called: list[str]
) -> None:
    age_certificate(place, north.root, days)
    made.service._take("executor", {"event": "asked", "message": "train"})
    made.look()
    assert made.called == called


def test_a_renewal_that_was_killed_is_finished_at_the_start(north: Site, made: Made) -> None:
    (north.keys / BEFORE).write_bytes(b"")
    made.look()
    assert made.called == ["settle"]


def test_the_node_restarts_with_a_certificate_that_a_command_renewed(
    place: Coordinator, north: Site, made: Made
) -> None:
    made.service._now.node = made.service._now.online = True
    made.service._show_renewed()
    assert made.node.stopped == 0
    age_certificate(place, north.root, 700)
    made.service._show_renewed()
    made.service._show_renewed()
    assert made.node.stopped == 1
    assert not made.service._now.serving
    (line,) = made.said
    assert line.startswith("Restarting the node: its certificate is new, until ")


def test_a_full_disk_does_not_end_the_service(north: Site, made: Made) -> None:
    """It ended with CLO-104, and the round under way with it, for a file that only `status` reads.

    Without its folder the file cannot be written either.
    """
    run = north.root / "run"
    run.rmdir()
    for event in ("online", "offline", "online"):
        made.service._events.put(("node", {"event": event, "why": "ConnectError"}))
        made.service._hear()
    (told,) = [line for line in made.said if "CLO-104" in line]
    assert told.startswith("CLO-104 service.json cannot be written. No such file")
    run.mkdir(mode=0o700)
    made.service._events.put(("node", {"event": "online"}))
    made.service._hear()
    assert '"online": true' in (run / service.STATE).read_text()


def test_the_node_goes_to_the_coordinators_new_address(north: Site, made: Made) -> None:
    made.service._go_to_new_address()
    assert made.node.stopped == 0
    held = membership(north)
    new = held.model_copy(update={"fleet": "fl.example.org:9443"})
    write_atomic(north.root / MEMBERSHIP, new.model_dump_json().encode())
    for _ in range(2):
        made.service._go_to_new_address()
    assert made.node.stopped == 1
    assert made.said == ["Restarting the node: the coordinator is at fl.example.org:9443."]
