"""Renewal of sites' certificates: judged where the request comes in, issued elsewhere.

The process with the ports holds no private key of the authority, so it only judges a request and
keeps it (``RenewalDesk``). ``issue_renewals`` certifies what waits, in a process of its own that
ends when it is done; see ``service.renewal_issuer``.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes, serialization

from cloister_fl.errors import CertificateExpired, EnrolmentRefused
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import Reply
from cloister_fl.membership.renewal_request import Renewal
from cloister_fl.server.coordinator.certificate_dates import authority_validity, replace_remedy
from cloister_fl.server.coordinator.folder import Coordinator
from cloister_fl.server.coordinator.site_database import Registry, SiteRow

SITE_RENEWED = "site-renewed"
"""Kind of the audit log's entry."""


@dataclass(frozen=True)
class RenewalDesk:
    """Takes requests of enrolled sites.

    Attributes:
        registry: the database.
        authority: SHA-256 of the authority's certificate, 32 bytes.
        root: the federation's root key, 32 bytes.
    """

    registry: Registry
    authority: bytes
    root: bytes

    def read(self, site: SiteRow, body: bytes) -> Renewal:
        """Read a request, and check whose it is; in any thread.

        Args:
            site: whose certificate the connection shows.
            body: the request, of a bounded size.

        Raises:
            MessageInvalid: it is malformed.
            EnrolmentRefused: it is another site's, or a key did not sign it for this connection
                (``why`` is ``proof-invalid``).
        """
        request = Renewal.decode(body)
        same = hmac.compare_digest(request.site.encode(), site.name.encode())
        shown = site.fingerprint or b""
        if not same or not request.proven(site.identity, shown, self.authority, self.root):
            raise EnrolmentRefused("The request was refused.", why="proof-invalid")
        return request

    def take(self, site: SiteRow, request: Renewal) -> Reply:
        """Keep a request that was read, or answer it; the roster is not in the answer.

        Raises:
            EnrolmentRefused: see ``RenewalRecords.ask``.
        """
        made = self.registry.renewals.ask(
            site.name, site.fingerprint or b"", request.node_key, request.tls_key
        )
        return Reply("pending") if made is None else Reply("approved", made)


def issue_renewals(place: Coordinator) -> tuple[str, ...]:
    """Certify the keys of all renewals that wait, and log each; the sites' names.

    What is no longer wanted is dropped: the site was revoked, its certificate has expired or was
    replaced since it asked.

    Raises:
        CertificateExpired: the authority has expired, and certifies nothing any more.
        FileUnreadable, IdentityInvalid: the authority's key or certificate cannot be used.
        AuditLogDamaged: it cannot be logged; nothing more is certified.
    """
    held = authority_validity(place)
    if held.days_left() <= 0:
        raise CertificateExpired(
            f"The authority's certificate {held.told()}, so it certifies nothing.",
            remedy=replace_remedy(place),
        )
    issued = []
    with place.deciding(), place.registry() as registry:
        authority = place.authority()
        for name in registry.renewals.waiting():
            site, wanted = registry.site(name), registry.renewals.of(name)
            if site is None or wanted is None or not _may_renew(site, wanted.replaces):
                registry.renewals.drop(name)
                continue
            key = ec_keys.load_public(wanted.tls_key, Purpose.TLS)
            assert key is not None, "checked when the site asked"
            certificate = authority.site_certificate(key, name)
            fingerprint = certificate.fingerprint(hashes.SHA256())
            # First: what the log does not know is not issued.
            place.federation().note(SITE_RENEWED, site=name, certificate=fingerprint.hex())
            ends = int(certificate.not_valid_after_utc.timestamp())
            der = certificate.public_bytes(serialization.Encoding.DER)
            if registry.renewals.issue(wanted, der, fingerprint, ends):
                issued.append(name)
    return tuple(issued)


def _may_renew(site: SiteRow, shown: bytes) -> bool:
    """Whether a site is approved, and the certificate that it showed is in force."""
    valid = site.valid_until is not None and site.valid_until > time.time()
    return site.state == "approved" and valid and site.fingerprint == shown
