"""The server's certificate is renewed in place, by the authority that hospitals trust."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from cloister_fl.errors import CertificateExpired
from cloister_fl.membership import validity
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator import certificate_authority, folder, server_renewal
from cloister_fl.server.coordinator.certificate_dates import authority_validity, server_validity
from cloister_fl.server.coordinator.folder import (
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Coordinator,
    Layout,
    init_coordinator,
)
from cloister_fl.server.coordinator.server_renewal import renew_server
from support import commands
from support.errors import raises

DAY_S = 86400.0


@pytest.fixture
def place(tmp_path: Path) -> Coordinator:
    return init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))


def _chain(place: Coordinator) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates((place.keys / SERVER_CERTIFICATE).read_bytes())


def test_the_certificate_is_another_and_authority_and_key_are_the_same(place: Coordinator) -> None:
    before, key = _chain(place), (place.keys / SERVER_KEY).read_bytes()
    told = commands.invoke(server_group.app, "renew", "--dir", place.root).output
    assert told == f"The server's certificate is renewed, until {server_validity(place).until}.\n"
    own, authority = _chain(place)
    assert own.serial_number != before[0].serial_number
    assert authority == before[1]
    own.verify_directly_issued_by(authority)
    assert own.extensions.get_extension_for_class(x509.SubjectAlternativeName) == before[
        0
    ].extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert (place.keys / SERVER_KEY).read_bytes() == key
    assert (
        "server-renewed" in commands.invoke(server_group.app, "audit", "--dir", place.root).output
    )


def test_killed_before_it_is_written_the_server_has_the_one_before(
    place: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _chain(place)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        renew_server(place)
    assert _chain(place) == before
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        place.keys / SERVER_CERTIFICATE, place.keys / SERVER_KEY
    )


def test_no_certificate_outlives_the_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate_authority, "AUTHORITY_YEARS", 1)
    place = init_coordinator(tmp_path / "short", Layout(("127.0.0.1:9443",)))
    assert server_validity(place).ends == authority_validity(place).ends


def test_an_expired_authority_certifies_nothing(
    place: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, later = _chain(place), time.time() + 3651 * DAY_S
    monkeypatch.setattr(validity.time, "time", lambda: later)
    with raises(CertificateExpired, match="so it certifies nothing"):
        server_renewal.renew_server(place)
    assert _chain(place) == before
