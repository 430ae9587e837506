"""A coordinator's fleet port without a network, and certificates of chosen dates, for tests."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from cloister_fl.client.network import join
from cloister_fl.client.network.http import Answer
from cloister_fl.client.network.node_keys import CERTIFICATE, Credentials, credentials
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import Invite, Request
from cloister_fl.membership.renewal_request import PATH_RENEW
from cloister_fl.server.coordinator import certificate_authority
from cloister_fl.server.coordinator.folder import (
    Coordinator,
    Layout,
    init_coordinator,
    open_coordinator,
)
from cloister_fl.server.coordinator.rejection_log import Refusals
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites
from cloister_fl.server.coordinator.site_database import SiteRow
from cloister_fl.server.coordinator.site_renewal import RenewalDesk, issue_renewals
from cloister_fl.server.network.fleet_gate import Engine, FleetGate
from cloister_fl.server.network.request_shape import RequestShapes
from cloister_fl.server.network.tls_listener import PEER, Peer


def enrolled(place: Coordinator, folder: Path, name: str = "north") -> Site:
    """A site that was invited, asked, was approved and has its certificate."""
    invite = invited(place, name)
    site = join.prepare(folder, invite)
    asked(place, site, invite)
    assert approve_site(place, name)
    picked_up(place, site, invite)
    return site


def template(folder: Path) -> Path:
    """A coordinator in ``fed``, and its enrolled site in ``north``: copy it, it took a second."""
    place = init_coordinator(folder / "fed", Layout(("127.0.0.1:9443",)))
    enrolled(place, folder / "north")
    return folder


def copied(made: Path, folder: Path) -> tuple[Coordinator, Site]:
    """A coordinator and a site of one's own, as ``template`` made them."""
    for name in ("fed", "north"):
        shutil.copytree(made / name, folder / name)
    return open_coordinator(folder / "fed"), open_site(folder / "north")


def invited(place: Coordinator, name: str = "north") -> Invite:
    """An invite, as the hospital gets it."""
    (made,) = invite_sites(place, [name], 600, to_file=False)
    return Invite.decode(made.line)


def asked(place: Coordinator, site: Site, invite: Invite) -> SiteRow:
    """What ``join.ask`` asks at the enrolment port."""
    keys = [(site.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
    request = Request.make(invite, site.identity(), *keys)
    assert request.proven(invite.authority, invite.root)
    with place.registry() as registry:
        return registry.use(request)


def picked_up(place: Coordinator, site: Site, invite: Invite) -> None:
    """What a site writes when it is approved."""
    row = row_of(place, site.name)
    member = join.Membership(
        fleet=invite.fleet,
        enrolment=invite.enrolment,
        authority=invite.authority.hex(),
        root=invite.root.hex(),
        invite=invite.invite_id.hex(),
        site=invite.site,
    )
    _write(site.root / join.AUTHORITY, certificate_authority.pem(place.authority().certificate))
    _write(site.root / join.MEMBERSHIP, member.model_dump_json().encode())
    assert row.certificate is not None
    _write(site.keys / CERTIFICATE, _pem(row.certificate))


def row_of(place: Coordinator, name: str = "north") -> SiteRow:
    with place.registry() as registry:
        row = registry.site(name)
    assert row is not None
    return row


def shown_by(site: Site) -> bytes:
    """SHA-256 of the certificate that a site shows."""
    held = credentials(site).certificate
    return x509.load_pem_x509_certificate(held).fingerprint(hashes.SHA256())


def age_certificate(place: Coordinator, folder: Path, days: float) -> None:
    """Give a site the certificate that it would have, if it ended in so many days.

    TLS judges dates by the clock of the machine, which a test cannot move; so the dates are.
    """
    site = open_site(folder)
    with mock.patch.object(certificate_authority, "LEAF_DAYS", days):
        held = credentials(site)
        key = ec_keys.load_private(held.tls_key, Purpose.TLS).public_key()
        made = place.authority().site_certificate(key, site.name)
    values = (
        made.public_bytes(serialization.Encoding.DER),
        made.fingerprint(hashes.SHA256()),
        int(made.not_valid_after_utc.timestamp()),
        site.name,
    )
    with closing(sqlite3.connect(place.state / "coordinator.sqlite")) as database, database:
        database.execute(
            "UPDATE sites SET certificate = ?, fingerprint = ?, valid_until = ? WHERE name = ?",
            values,
        )
    pem = made.public_bytes(serialization.Encoding.PEM)
    whole = Credentials(pem, held.tls_key, held.node_key, together=True).encode()
    _write(site.keys / CERTIFICATE, whole if held.together else pem)


@dataclass
class FleetPort:
    """Answers what ``renewal`` dials, by the gate itself; issues what waits, as its process does.

    Attributes:
        place: the coordinator's folder.
        site: whose requests these are.
        issues: whether the process that issues certificates runs.
        lost: paths whose answers do not arrive.
        meanwhile: what else the event loop is to do, once a request has come.
    """

    place: Coordinator
    site: Site
    issues: bool = True
    lost: set[str] = field(default_factory=set)
    meanwhile: Callable[[], object] = lambda: None

    def dial(
        self, context: Any, method: str, address: str, path: str, body: bytes = b"", **_: Any
    ) -> Answer:
        del context, address
        status, answered = self.ask(shown_by(self.site), method, path, body)
        if path == PATH_RENEW and self.issues:
            issue_renewals(self.place)
        if path in self.lost:
            raise ConnectionAbortedError
        now = time.time()
        return Answer(status, answered, {}, "", now, now)

    def ask(self, shown: bytes, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One request of whoever shows a certificate: status and body."""
        events: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            asyncio.get_running_loop().call_later(0.05, self.meanwhile)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            events.append(event)

        refusals = Refusals(self.place.refusals)
        authority = self.place.authority()
        with closing(refusals), self.place.registry() as registry:
            desk = RenewalDesk(registry, authority.fingerprint, self.place.federation_root())
            gate = FleetGate(
                _no_engine(),
                registry,
                refusals,
                self.place.keys / "roster",
                RequestShapes(lambda: 0),
                desk,
            )
            scope = {
                "type": "http",
                "method": method,
                "path": path,
                "state": {PEER: Peer("127.0.0.1", shown)},
                "headers": [],
            }
            asyncio.run(gate(scope, receive, send))
        return events[0]["status"], events[1]["body"]


def _no_engine() -> Engine:
    never: Callable[..., Any] = mock.Mock(side_effect=AssertionError)
    return Engine(never, b"key", frozenset(), never, "", never, "", never, "", never)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
