"""Certificates whose end is near are told, and an expired one of the server does not start."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cloister_fl.client.network import join
from cloister_fl.client.network.node_keys import date_warnings
from cloister_fl.errors import CertificateExpired, ClockOrDates
from cloister_fl.membership import validity
from cloister_fl.membership.enrolment import Invite, Request
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator.certificate_dates import (
    require_valid,
    warnings_of,
)
from cloister_fl.server.coordinator.folder import Coordinator, Layout, init_coordinator
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites
from cloister_fl.server.service import supervisor
from support import commands
from support.errors import raises

DAY_S = 86400.0


@pytest.fixture
def place(tmp_path: Path) -> Coordinator:
    return init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> object:
    """Move the clock by which certificates are judged, in days from now."""

    begun = time.time()

    def moved(days: float) -> None:
        monkeypatch.setattr(validity.time, "time", lambda: begun + days * DAY_S)

    return moved


@pytest.mark.parametrize(
    ("days", "told"),
    [
        (0, ()),
        (669, ()),
        (671, ("The server's certificate ends on",)),
        (731, ("The server's certificate expired on",)),
        (3000, ("The server's certificate expired on", "The authority's certificate ends on")),
    ],
)
def test_the_end_of_server_and_authority_is_told(
    place: Coordinator, set_clock: object, days: float, told: tuple[str, ...]
) -> None:
    set_clock(days)  # type: ignore[operator]
    lines = warnings_of(place)
    assert [line.startswith(words) for line, words in zip(lines, told, strict=True)] == [
        True for _ in told
    ]
    shown = commands.invoke(server_group.app, "status", "--dir", place.root).output
    assert all(line in shown for line in lines)
    as_json = commands.invoke(server_group.app, "status", "--dir", place.root, "--json").output
    assert json.loads(as_json)["warnings"] == list(lines)


def test_the_end_of_a_site_s_certificate_is_told_on_both_sides(
    place: Coordinator, tmp_path: Path, set_clock: object
) -> None:
    (made,) = invite_sites(place, ["north"], 600, to_file=False)
    site = join.prepare(tmp_path / "north", invite := Invite.decode(made.line))
    keys = [(site.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
    with place.registry() as registry:
        registry.use(Request.make(invite, site.identity(), *keys))
        assert approve_site(place, "north")
        row = registry.site("north")
    assert row is not None
    assert row.certificate is not None
    (site.keys / join.CERTIFICATE).write_bytes(_pem(row.certificate))
    (site.keys / join.CERTIFICATE).chmod(0o600)
    assert (warnings_of(place), date_warnings(site)) == ((), ())
    set_clock(675)  # type: ignore[operator]
    (line,) = date_warnings(site)
    assert line.startswith("This site's certificate ends on")
    assert len(warnings_of(place)) == 1  # the server's alone: the site has a month to see to it
    set_clock(705)  # type: ignore[operator]
    assert warnings_of(place)[-1].startswith("The certificate of north ends on")
    (site.keys / join.CERTIFICATE).write_text("not a certificate")
    assert date_warnings(site) == ("client.pem or tls.pem is damaged.",)


def _pem(der: bytes) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def test_an_expired_server_certificate_does_not_start(
    place: Coordinator, set_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor._Service, "run", pytest.fail)
    set_clock(731)  # type: ignore[operator]
    with raises(CertificateExpired, match="The server's certificate expired on") as caught:
        commands.invoke(server_group.app, "start", "--dir", place.root)
    assert caught.value.remedy.endswith(f" --dir {place.root}")


@pytest.mark.parametrize(
    ("days", "error", "told"),
    [
        (-1, ClockOrDates, "which is not yet"),
        (729, None, ""),
        (731, CertificateExpired, "The server's certificate"),
        (3651, CertificateExpired, "The authority's certificate"),
    ],
)
def test_what_stops_a_start(
    place: Coordinator, set_clock: object, days: float, error: object, told: str
) -> None:
    set_clock(days)  # type: ignore[operator]
    if error is None:
        require_valid(place)
        return
    with raises(error, match=told):  # type: ignore[arg-type]
        require_valid(place)
