"""Renewal of the site's certificate and node key, over the connection that the old ones secure.

::

    keys/renewal.pem         the keys to come, while a renewal is under way
    keys/client-before.pem   certificate and keys that were replaced, until the new ones were used

The identity is not touched; it signs the request. Killed at any line, the site has a certificate
that the coordinator takes, with its keys: the new keys are on disk before they are asked for, so
asking again brings the same certificate; the file that holds certificate and keys is replaced by
one rename; and the coordinator takes the old certificate until the first request that shows the
new one. That request is made here, as the last step; if the coordinator does not know the new
certificate then, as when its database came from a backup, the old one is put back.
"""

from __future__ import annotations

import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cloister_fl.client.network.http import Answer, Failure, dial
from cloister_fl.client.network.http_errors import error_of
from cloister_fl.client.network.join import (
    Membership,
    check_status,
    checked_certificate,
    client_context,
    membership,
)
from cloister_fl.client.network.node_keys import (
    CERTIFICATE,
    NODE_KEY,
    TLS_KEY,
    Credentials,
    credentials,
    own_validity,
    renewal_remedy,
)
from cloister_fl.client.network.proxy import proxy_of
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import ClockOrDates, EnrolmentRefused, SiteStateInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import PATH_ROSTER, Reply
from cloister_fl.membership.renewal_request import PATH_RENEW, Renewal
from cloister_fl.membership.validity import Validity
from cloister_fl.system.files import create_secret, locked, read_secret, write_atomic

PENDING = "renewal.pem"
BEFORE = "client-before.pem"
RENEWED = "renewed"
"""Kind of the audit log's entry."""
WAIT_S = 60.0
"""How long the coordinator is asked again for a certificate that it has not issued yet, in s."""
POLL_S = 1.0
_LOCK = ".renewal.lock"


def renew_certificate(site: Site) -> Validity:
    """Replace certificate, TLS key and node key; the new dates. Can be repeated, also after a kill.

    A service that runs restarts its node with them.

    Raises:
        InviteInvalid: the site has joined no federation.
        SiteStateInvalid: it has no certificate yet.
        ClockOrDates: its certificate has expired, so nothing secures a renewal.
        EnrolmentRefused: the coordinator refuses it, or has not issued the certificate in time.
        CoordinatorUnreachable, CoordinatorUnproven, ProxyUnusable, ProxyLoginRefused,
        ProxyForbids: see their pages.
        FileUnreadable, OutputInTheWay, MessageInvalid, AuditLogDamaged: as for ``look``.
    """
    member = membership(site)
    with locked(site.keys / _LOCK):
        is_done = _settle(site, member)
        own = own_validity(site)
        if is_done and own is not None:
            return own
        if own is None:
            raise SiteStateInvalid(
                "This site has no certificate yet.",
                remedy=f"Fetch the coordinator's approval: {site.command('join')}",
            )
        if own.days_left() <= 0:
            raise ClockOrDates(
                f"This site's certificate {own.told()}.", remedy=renewal_remedy(own, site)
            )
        tls, node = _keys_to_come(site)
        der = _issued(site, member, (node, tls))
        certificate = checked_certificate(site, member, der, tls)
        _switch(site, Credentials(certificate, tls, node, together=True))
        _settle(site, member)
    renewed = own_validity(site)
    assert renewed is not None, "it was just written"
    return renewed


def settle(site: Site) -> None:
    """Finish a renewal that was killed once the new certificate was there; else do nothing.

    Raises:
        see ``renew_certificate``.
    """
    if is_unsettled(site):
        member = membership(site)
        with locked(site.keys / _LOCK):
            _settle(site, member)


def is_unsettled(site: Site) -> bool:
    """Whether a new certificate is there that was perhaps not used yet."""
    return (site.keys / BEFORE).exists()


def _settle(site: Site, member: Membership) -> bool:
    """Use the certificate in force once, where a renewal came so far; whether that ended it.

    Then nothing of the certificate before, or of the way to the new one, is left.
    """
    path = site.keys / BEFORE
    if not path.exists():
        return False
    before, held = read_secret(path), credentials(site)
    is_new = held.encode() != before
    answer = _dialled(site, member, "GET", PATH_ROSTER)
    if is_new and answer.status == 403 and answer.body == b"certificate-unknown":
        # The old certificate is good for as long as the new one was never taken.
        write_atomic(site.keys / CERTIFICATE, before)
        (site.keys / PENDING).unlink(missing_ok=True)
        path.unlink()
    check_status(answer)
    if is_new:
        log_of(site).append(RENEWED, certificate=_fingerprint(held).hex())
        for name in (TLS_KEY, NODE_KEY, PENDING):
            (site.keys / name).unlink(missing_ok=True)
    # Last: as long as it is there, this is done again.
    path.unlink()
    return is_new


def _keys_to_come(site: Site) -> tuple[bytes, bytes]:
    """New private keys of TLS and node, PEM: those of an earlier attempt, else made now."""
    path = site.keys / PENDING
    if path.exists() and _keys_in(path) is None:
        path.unlink()
    made = [ec_keys.generate_pem(purpose) for purpose in (Purpose.TLS, Purpose.NODE)]
    create_secret(path, b"".join(made))
    keys = _keys_in(path)
    assert keys is not None, "it was just written"
    return keys


def _keys_in(path: Path) -> tuple[bytes, bytes] | None:
    """Keys of TLS and node that a file holds; ``None`` where it holds something else."""
    if not path.exists():
        return None
    one = Credentials.decode(read_secret(path))
    return (one.tls_key, one.node_key) if one is not None else None


def _issued(site: Site, member: Membership, keys: tuple[bytes, bytes]) -> bytes:
    """The certificate for new keys of node and TLS, DER, from the coordinator."""
    request = Renewal.make(
        site.name,
        site.identity(),
        keys,
        shown=_fingerprint(credentials(site)),
        authority=bytes.fromhex(member.authority),
        root=bytes.fromhex(member.root),
    ).encode()
    end = time.monotonic() + WAIT_S
    while True:
        answer = _dialled(site, member, "POST", PATH_RENEW, request)
        if answer.body == b"key-in-use":
            # Of a renewal that was given up; the next one has other keys.
            (site.keys / PENDING).unlink(missing_ok=True)
        check_status(answer)
        reply = Reply.decode(answer.body)
        if reply.state == "approved":
            return reply.certificate
        if time.monotonic() >= end:
            raise EnrolmentRefused(
                f"The coordinator has not issued the certificate within {WAIT_S:g} s.",
                why="The one in force still holds.",
                remedy=f"Try again: {site.command('renew')}",
            )
        time.sleep(POLL_S)


def _switch(site: Site, new: Credentials) -> None:
    """Put new credentials in force, and keep the old ones until the new ones were used."""
    write_atomic(site.keys / BEFORE, credentials(site).encode())
    write_atomic(site.keys / CERTIFICATE, new.encode())


def _dialled(site: Site, member: Membership, method: str, path: str, body: bytes = b"") -> Answer:
    """One request that shows the site's certificate; whatever status was answered."""
    answer = dial(client_context(site), method, member.fleet, path, body, proxy=proxy_of(site))
    if isinstance(answer, Failure):
        raise error_of(answer, site)
    return answer


def _fingerprint(held: Credentials) -> bytes:
    return x509.load_pem_x509_certificate(held.certificate).fingerprint(hashes.SHA256())
