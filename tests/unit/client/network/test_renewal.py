"""A renewal that is killed at any line leaves the site a certificate and keys that are taken."""

from __future__ import annotations

import os
import signal
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_fl.client.network import renewal
from cloister_fl.client.network.http import Answer
from cloister_fl.client.network.node_keys import (
    CERTIFICATE,
    NODE_KEY,
    TLS_KEY,
    credentials,
    date_warnings,
    node_key,
    own_validity,
    show_certificate,
)
from cloister_fl.client.network.renewal import BEFORE, PENDING, renew_certificate, settle
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import IDENTITY, Site
from cloister_fl.errors import ClockOrDates, CoordinatorUnproven, EnrolmentRefused, SiteStateInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import PATH_ROSTER, Reply
from cloister_fl.membership.renewal_request import PATH_RENEW
from cloister_fl.membership.validity import RENEW_DAYS
from cloister_fl.server.coordinator.folder import (
    Coordinator,
    Layout,
    init_coordinator,
)
from support.errors import raises
from support.renewals import FleetPort, age_certificate, copied, row_of, shown_by, template


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("made"))


@pytest.fixture
def both(made: Path, tmp_path: Path) -> tuple[Coordinator, Site]:
    return copied(made, tmp_path)


@pytest.fixture
def place(both: tuple[Coordinator, Site]) -> Coordinator:
    return both[0]


@pytest.fixture
def north(both: tuple[Coordinator, Site]) -> Site:
    age_certificate(both[0], both[1].root, RENEW_DAYS - 1)
    return both[1]


@pytest.fixture
def port(place: Coordinator, north: Site, monkeypatch: pytest.MonkeyPatch) -> FleetPort:
    made = FleetPort(place, north)
    monkeypatch.setattr(renewal, "dial", made.dial)
    monkeypatch.setattr(renewal, "POLL_S", 0.0)
    return made


def taken(place: Coordinator, site: Site) -> bool:
    """Whether the coordinator takes what the site shows, and knows its node key by it."""
    show_certificate(site, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    status, _ = FleetPort(place, site).ask(shown_by(site), "GET", PATH_ROSTER)
    row = row_of(place, site.name)
    own = ec_keys.public_pem(node_key(site))
    return status == 200 and (row.fingerprint, row.node_key) == (shown_by(site), own)


def days_left(site: Site) -> float:
    own = own_validity(site)
    assert own is not None
    return own.days_left()


def test_certificate_and_both_keys_are_new_and_the_identity_is_not(
    place: Coordinator, north: Site, port: FleetPort
) -> None:
    identity, before = (north.keys / IDENTITY).read_bytes(), credentials(north)
    assert date_warnings(north)[0].startswith("This site's certificate ends on")
    made = renew_certificate(north)
    after = credentials(north)
    assert made.days_left() > 700
    assert not {before.certificate, before.tls_key, before.node_key} & {
        after.certificate,
        after.tls_key,
        after.node_key,
    }
    assert taken(place, north)
    assert (north.keys / IDENTITY).read_bytes() == identity
    left = {path.name for path in north.keys.iterdir()}
    assert not left & {BEFORE, PENDING, TLS_KEY, NODE_KEY}
    assert [entry.kind for entry in entries_of(north)] == ["renewed"]
    assert date_warnings(north) == ()


EFFECTS = ("create_secret", "dial", "log_of", "write_atomic")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_killed_at_any_line_the_site_has_a_certificate_that_is_taken(
    place: Coordinator, north: Site, tmp_path: Path
) -> None:
    """Lines between two effects leave the same files, so each effect has a kill behind it."""
    behind = -1
    killed = True
    while killed:
        behind += 1
        folder = tmp_path / f"behind-{behind}"
        here, site = copied(tmp_path, folder)
        killed = _killed_behind(behind, here, site)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(renewal, "dial", FleetPort(here, site).dial)
            patch.setattr(renewal, "POLL_S", 0.0)
            assert taken(here, site), behind
            # What a service does when it starts.
            settle(site)
            if days_left(site) < RENEW_DAYS:
                renew_certificate(site)
        assert days_left(site) > 700, behind
        assert taken(here, site), behind
        left = {path.name for path in site.keys.iterdir()}
        assert not left & {BEFORE, PENDING, TLS_KEY, NODE_KEY}, behind
    assert behind >= 11


def _killed_behind(number: int, place: Coordinator, site: Site) -> bool:
    """Renew in a process that is killed behind so many effects; whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left, ended = number, 1

    def die() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(effect: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **more: Any) -> Any:
            done = effect(*args, **more)
            die()
            return done

        return made

    try:
        die()
        renewal.dial = FleetPort(place, site).dial  # type: ignore[assignment]
        renewal.POLL_S = 0.0
        for name in EFFECTS:
            setattr(renewal, name, counted(getattr(renewal, name)))
        unlink = Path.unlink

        def removed(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            if path.parent == site.keys and path.suffix == ".pem":
                die()

        Path.unlink = removed  # type: ignore[method-assign]
        renew_certificate(site)
        ended = 0
    finally:
        os._exit(ended)


def test_a_lost_answer_costs_nothing(place: Coordinator, north: Site, port: FleetPort) -> None:
    port.lost = {PATH_RENEW}
    for _ in range(2):
        with pytest.raises(ConnectionAbortedError):
            renew_certificate(north)
        assert taken(place, north)
    port.lost = set()
    assert renew_certificate(north).days_left() > 700


def test_the_coordinator_went_away_before_the_new_one_was_used(
    place: Coordinator, north: Site, port: FleetPort
) -> None:
    port.lost = {PATH_ROSTER}
    with pytest.raises(ConnectionAbortedError):
        renew_certificate(north)
    port.lost = set()
    settle(north)
    assert taken(place, north)
    assert not (north.keys / BEFORE).exists()


def test_a_coordinator_that_lost_the_new_certificate_takes_the_old_one(
    place: Coordinator, north: Site, port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, switch = shown_by(north), renewal._switch

    def restored(*args: Any) -> None:
        switch(*args)
        with place.registry() as registry:  # a backup from before
            registry.renewals.drop("north")

    monkeypatch.setattr(renewal, "_switch", restored)
    with raises(EnrolmentRefused, match="unknown to the coordinator"):
        renew_certificate(north)
    assert shown_by(north) == old
    assert taken(place, north)
    assert not (north.keys / PENDING).exists()


@pytest.mark.parametrize(("own_authority", "name"), [(False, "north"), (True, "south")])
def test_a_lying_coordinator_s_certificate_is_not_put_in_force(
    place: Coordinator,
    north: Site,
    port: FleetPort,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    own_authority: bool,
    name: str,
) -> None:
    held = (north.keys / CERTIFICATE).read_bytes()
    liar = place
    if not own_authority:
        liar = init_coordinator(tmp_path / "other", Layout(("127.0.0.1:9443",)))

    def lies(context: Any, *asked: Any, **more: Any) -> Answer:
        path = asked[2]
        answer = port.dial(context, *asked, **more)
        if path != PATH_RENEW or Reply.decode(answer.body).state != "approved":
            return answer
        keys = renewal._keys_in(north.keys / PENDING)
        assert keys is not None
        own = ec_keys.load_private(keys[0], Purpose.TLS).public_key()
        forged = liar.authority().site_certificate(own, name).public_bytes(Encoding.DER)
        return replace(answer, body=Reply("approved", forged).encode())

    monkeypatch.setattr(renewal, "dial", lies)
    with raises(CoordinatorUnproven, match="not for this site's key"):
        renew_certificate(north)
    assert (north.keys / CERTIFICATE).read_bytes() == held
    assert taken(place, north)


def test_a_coordinator_that_issues_nothing_is_not_waited_for_without_end(
    place: Coordinator, north: Site, port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "WAIT_S", 0.0)
    port.issues = False
    with raises(EnrolmentRefused, match="has not issued the certificate") as caught:
        renew_certificate(north)
    assert caught.value.remedy.endswith(f"cloister client renew --dir {north.root}")
    assert taken(place, north)


def test_an_expired_certificate_names_the_way_back(place: Coordinator, north: Site) -> None:
    age_certificate(place, north.root, -0.01)
    with raises(ClockOrDates, match="expired on") as caught:
        renew_certificate(north)
    assert f"cloister client join INVITE-FILE --new-keys --dir {north.root}" in caught.value.remedy
    (north.keys / CERTIFICATE).unlink()
    with raises(SiteStateInvalid, match="has no certificate yet"):
        renew_certificate(north)
