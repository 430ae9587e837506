"""Dates of the coordinator's certificates: what stops a start, and what is told before that."""

from __future__ import annotations

from cryptography import x509

from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import CertificateExpired, ClockOrDates, FileUnreadable
from cloister_fl.membership.validity import AUTHORITY_DAYS, RENEW_DAYS, Validity
from cloister_fl.server.coordinator.certificate_authority import CA_CERTIFICATE
from cloister_fl.server.coordinator.folder import SERVER_CERTIFICATE, Coordinator
from cloister_fl.system import utc
from cloister_fl.system.files import read_secret

SITE_DAYS = 30
"""Days before the end of a site's certificate from which the coordinator is told of it; the site
itself is told a month earlier."""


def server_validity(place: Coordinator) -> Validity:
    """The dates of the server's certificate.

    Raises:
        FileUnreadable: it is missing, damaged, or others could have changed it.
    """
    return _validity(place, SERVER_CERTIFICATE)


def authority_validity(place: Coordinator) -> Validity:
    """The dates of the authority's certificate; raises as ``server_validity``."""
    return _validity(place, CA_CERTIFICATE)


def require_valid(place: Coordinator) -> None:
    """Refuse to serve with a certificate that no hospital would believe now.

    Raises:
        CertificateExpired: the authority's or the server's certificate has expired.
        ClockOrDates: one of them does not hold yet, so this machine's clock is wrong.
        FileUnreadable: see ``server_validity``.
    """
    authority, server = authority_validity(place), server_validity(place)
    for name, held in (("authority's", authority), ("server's", server)):
        if held.is_early():
            raise ClockOrDates(
                f"The {name} certificate is valid from {utc.to_minute(held.begins)} UTC, which is "
                "not yet.",
                remedy="Set this machine's clock; it is wrong.",
            )
    if authority.days_left() <= 0:
        raise CertificateExpired(
            f"The authority's certificate expired on {authority.until}.",
            why="All certificates of the federation ended with it.",
            remedy=replace_remedy(place),
        )
    if server.days_left() <= 0:
        raise CertificateExpired(
            f"The server's certificate expired on {server.until}.",
            why="No hospital connects to a server whose certificate has expired.",
            remedy=f"Renew it, for which no hospital does anything: {_renew(place)}",
        )


def warnings_of(place: Coordinator) -> tuple[str, ...]:
    """What a person is told of certificates whose end is near, a sentence each.

    A certificate that cannot be read is a sentence, too: ``status`` is asked when things are
    wrong.
    """
    try:
        authority, server = authority_validity(place), server_validity(place)
    except FileUnreadable as error:
        return (error.what,)
    found = []
    if server.days_left() < RENEW_DAYS:
        found.append(f"The server's certificate {server.told()}. Renew it: {_renew(place)}")
    if authority.days_left() < AUTHORITY_DAYS:
        found.append(
            f"The authority's certificate {authority.told()}, and with it all others. "
            f"{replace_remedy(place)}"
        )
    with place.registry() as registry:
        rows = registry.sites()
    for row in rows:
        if row.state == "approved" and row.valid_until is not None:
            held = Validity(utc.from_unix(row.asked), utc.from_unix(row.valid_until))
            if held.days_left() < SITE_DAYS:
                found.append(f"The certificate of {row.name} {held.told()}. {_of_site(held)}")
    return tuple(found)


def _of_site(held: Validity) -> str:
    if held.days_left() <= 0:
        return "It cannot be renewed any more: revoke the site, and invite it again."
    return "Tell the hospital: its service renews it while it runs, or cloister client renew does."


def _renew(place: Coordinator) -> str:
    return f"cloister server renew{dir_option(place.root)}"


def replace_remedy(place: Coordinator) -> str:
    """What is done about an authority whose end is near."""
    del place
    return "Plan a new federation, which all hospitals join: docs/deploy-coordinator.md, Keys."


def _validity(place: Coordinator, name: str) -> Validity:
    data = read_secret(place.keys / name)
    try:
        return Validity.of(x509.load_pem_x509_certificates(data)[0])
    except ValueError:
        raise FileUnreadable(
            f"{name} is not a certificate in PEM.",
            remedy="Restore it from the backup of the coordinator's folder.",
        ) from None
