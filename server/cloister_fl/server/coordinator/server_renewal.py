"""Renewal of the server's certificate in place."""

from __future__ import annotations

from cloister_fl.errors import CertificateExpired
from cloister_fl.membership.validity import Validity
from cloister_fl.server.coordinator.certificate_dates import (
    authority_validity,
    replace_remedy,
    server_validity,
)
from cloister_fl.server.coordinator.folder import Coordinator, certify_server

SERVER_RENEWED = "server-renewed"
"""Kind of the audit log's entry."""


def renew_server(place: Coordinator) -> Validity:
    """Certify the server's key anew, by the same authority, and log it; the new dates.

    Hospitals trust the authority, so none of them does anything; a server that runs shows the new
    certificate from its next look at the folder.

    Raises:
        CertificateExpired: the authority has expired, and certifies nothing any more.
        FileUnreadable, IdentityInvalid: a key or certificate cannot be used.
        AuditLogDamaged: it cannot be logged; the certificate stays as it is.
    """
    authority = authority_validity(place)
    if authority.days_left() <= 0:
        raise CertificateExpired(
            f"The authority's certificate {authority.told()}, so it certifies nothing.",
            remedy=replace_remedy(place),
        )
    with place.deciding():
        place.federation().note(SERVER_RENEWED)
        certify_server(place, place.authority(), anew=True)
    return server_validity(place)
