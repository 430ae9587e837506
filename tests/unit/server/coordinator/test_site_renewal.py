"""A site's certificate is renewed over the one in force, for that site, while it holds."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CertificateExpired
from cloister_fl.membership import ec_keys, validity
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import PATH_ROSTER, Reply
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.renewal_request import MAX_RENEWAL_BYTES, PATH_RENEW, Renewal
from cloister_fl.server.coordinator import renewal_records
from cloister_fl.server.coordinator.folder import Coordinator
from cloister_fl.server.coordinator.site_approval import revoke_site
from cloister_fl.server.coordinator.site_renewal import SITE_RENEWED, issue_renewals
from cloister_fl.server.network import database_writes
from support.errors import raises
from support.renewals import FleetPort, copied, enrolled, row_of, shown_by, template

DAY_S = 86400.0
Keys = tuple[bytes, bytes]


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
    return both[1]


@pytest.fixture
def port(place: Coordinator, north: Site) -> FleetPort:
    return FleetPort(place, north)


def new_keys() -> Keys:
    return ec_keys.generate_pem(Purpose.NODE), ec_keys.generate_pem(Purpose.TLS)


def request(port: FleetPort, keys: Keys, identity: Identity | None = None, **change: str) -> bytes:
    made = Renewal.make(
        change.get("site", port.site.name),
        identity or port.site.identity(),
        keys,
        shown=shown_by(port.site),
        authority=port.place.authority().fingerprint,
        root=port.place.federation_root(),
    )
    return made.encode()


def ask(port: FleetPort, keys: Keys) -> Reply:
    status, body = port.ask(shown_by(port.site), "POST", PATH_RENEW, request(port, keys))
    assert status == 200, body
    return Reply.decode(body)


def issued(port: FleetPort, keys: Keys) -> x509.Certificate:
    assert ask(port, keys).state == "pending"
    assert issue_renewals(port.place) == (port.site.name,)
    return x509.load_der_x509_certificate(ask(port, keys).certificate)


def uses(port: FleetPort, shown: bytes) -> tuple[int, bytes]:
    status, body = port.ask(shown, "GET", PATH_ROSTER)
    return status, b"" if status == 200 else body


def mark(certificate: x509.Certificate) -> bytes:
    return certificate.fingerprint(hashes.SHA256())


def test_the_certificate_is_for_the_same_name_and_the_new_key(port: FleetPort) -> None:
    keys, before = new_keys(), row_of(port.place)
    made = issued(port, keys)
    (name,) = made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == "north"
    assert made.public_key() == ec_keys.load_private(keys[1], Purpose.TLS).public_key()
    after = row_of(port.place)
    # Nothing of the old one has changed yet.
    assert replace(after, collected=None, seen=None) == before
    (noted,) = [e for e in port.place.federation().log.entries() if e.kind == SITE_RENEWED]
    assert dict(noted.body) == {"site": "north", "certificate": mark(made).hex()}


def test_the_old_certificate_holds_until_the_new_one_is_used(port: FleetPort) -> None:
    keys, old = new_keys(), shown_by(port.site)
    new = mark(issued(port, keys))
    assert uses(port, old) == (200, b"")
    before = row_of(port.place)
    assert uses(port, new) == (200, b"")
    after = row_of(port.place)
    assert uses(port, old) == (403, b"certificate-unknown")
    assert uses(port, new) == (200, b"")
    assert after.node_key == ec_keys.public_pem(ec_keys.load_private(keys[0], Purpose.NODE))
    assert after.identity == before.identity
    with port.place.registry() as registry:
        assert registry.renewals.successors() == {after.node_key: before.node_key}
        assert old in registry.renewals.retired("certificate")


def test_a_lost_answer_brings_the_same_certificate_again(port: FleetPort) -> None:
    keys = new_keys()
    made = issued(port, keys)
    assert ask(port, keys).certificate == ask(port, keys).certificate
    assert mark(made) == mark(x509.load_der_x509_certificate(ask(port, keys).certificate))
    assert issue_renewals(port.place) == ()


def test_a_certificate_without_the_identity_renews_nothing(port: FleetPort) -> None:
    forged = request(port, new_keys(), Identity.generate())
    answer = port.ask(shown_by(port.site), "POST", PATH_RENEW, forged)
    assert answer == (403, b"proof-invalid")
    assert issue_renewals(port.place) == ()


def test_a_hospital_gets_no_certificate_in_another_one_s_name(
    port: FleetPort, tmp_path: Path
) -> None:
    south = enrolled(port.place, tmp_path / "south", "south")
    for site in ("south", "coordinator"):
        body = request(port, new_keys(), site=site)
        answer = port.ask(shown_by(port.site), "POST", PATH_RENEW, body)
        assert answer == (403, b"proof-invalid")
    # Nor by the connection of the other one.
    body = request(port, new_keys())
    assert port.ask(shown_by(south), "POST", PATH_RENEW, body) == (403, b"proof-invalid")


def test_a_revoked_site_is_not_renewed_whenever_it_was_revoked(
    port: FleetPort, tmp_path: Path
) -> None:
    keys, shown = new_keys(), shown_by(port.site)
    ask(port, keys)
    revoke_site(port.place, "north")
    assert issue_renewals(port.place) == ()
    answer = port.ask(shown, "POST", PATH_RENEW, request(port, keys))
    assert answer == (403, b"certificate-revoked")
    south = FleetPort(port.place, enrolled(port.place, tmp_path / "south", "south"))
    new = mark(issued(south, new_keys()))
    revoke_site(port.place, "south")
    assert uses(south, new) == (403, b"certificate-unknown")


def test_an_expired_certificate_renews_nothing(port: FleetPort) -> None:
    keys = new_keys()
    assert ask(port, keys).state == "pending"
    with closing(sqlite3.connect(port.place.state / "coordinator.sqlite")) as rows, rows:
        rows.execute("UPDATE sites SET valid_until = ?", (int(time.time()) - 1,))
    answer = port.ask(shown_by(port.site), "POST", PATH_RENEW, request(port, keys))
    assert answer == (403, b"certificate-expired")
    assert issue_renewals(port.place) == ()
    with port.place.registry() as registry:
        assert registry.renewals.of("north") is None


def test_no_key_comes_back(port: FleetPort, tmp_path: Path) -> None:
    south = enrolled(port.place, tmp_path / "south", "south")
    theirs = tuple((south.keys / name).read_bytes() for name in ("node.pem", "tls.pem"))
    body = request(port, (theirs[0], theirs[1]))
    shown = shown_by(port.site)
    assert port.ask(shown, "POST", PATH_RENEW, body) == (403, b"key-in-use")
    own = tuple((port.site.keys / name).read_bytes() for name in ("node.pem", "tls.pem"))
    mixed = request(port, (own[0], new_keys()[1]))
    assert port.ask(shown, "POST", PATH_RENEW, mixed) == (403, b"key-in-use")


def test_a_hospital_that_renews_without_end_waits_an_hour(
    port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued(port, new_keys())
    shown = shown_by(port.site)
    again = request(port, new_keys())
    assert port.ask(shown, "POST", PATH_RENEW, again) == (429, b"renewed-lately")
    later = time.time() + renewal_records.AGAIN_S
    monkeypatch.setattr(renewal_records.time, "time", lambda: later)
    assert port.ask(shown, "POST", PATH_RENEW, again)[0] == 200


def test_a_request_that_is_too_long_is_refused_before_it_is_parsed(
    port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Renewal, "decode", pytest.fail)
    answer = port.ask(shown_by(port.site), "POST", PATH_RENEW, b"\0" * (MAX_RENEWAL_BYTES + 1))
    assert answer == (413, b"body-too-large")


def test_an_expired_authority_issues_nothing(
    port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(port, new_keys())
    later = time.time() + 3651 * DAY_S
    monkeypatch.setattr(validity.time, "time", lambda: later)
    with raises(CertificateExpired, match="so it certifies nothing"):
        issue_renewals(port.place)


def test_a_database_that_is_locked_costs_a_site_its_request_and_no_more(port: FleetPort) -> None:
    """Flower's port answered 500, with the error's own words in what it raised."""
    new = mark(issued(port, new_keys()))
    with closing(sqlite3.connect(port.place.state / "coordinator.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert uses(port, new) == (503, b"busy")
    assert uses(port, new) == (200, b"")


def test_a_renewal_waits_for_the_database_without_the_event_loop(port: FleetPort) -> None:
    """The loop stood still for ten seconds, and with it every hospital's requests."""
    with closing(sqlite3.connect(port.place.state / "coordinator.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        port.meanwhile = other.rollback
        status, _ = port.ask(shown_by(port.site), "POST", PATH_RENEW, request(port, new_keys()))
    assert status == 200


def test_a_renewal_that_waited_in_vain_may_be_asked_for_again(
    port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_writes, "WAIT_S", 0.0)
    wanted = request(port, new_keys())
    with closing(sqlite3.connect(port.place.state / "coordinator.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert port.ask(shown_by(port.site), "POST", PATH_RENEW, wanted) == (503, b"busy")
    assert port.ask(shown_by(port.site), "POST", PATH_RENEW, wanted)[0] == 200


def test_a_clock_that_was_ahead_keeps_nobody_from_renewing(
    port: FleetPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site was refused as `renewed-lately` until the day that the clock had named."""
    year_ahead, now = time.time() + 365 * DAY_S, time.time
    monkeypatch.setattr(renewal_records.time, "time", lambda: year_ahead)
    with port.place.registry() as registry:
        registry.renewals.ask("north", shown_by(port.site), b"node", b"tls")
    monkeypatch.setattr(renewal_records.time, "time", now)
    assert port.ask(shown_by(port.site), "POST", PATH_RENEW, request(port, new_keys()))[0] == 200
