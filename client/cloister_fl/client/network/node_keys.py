"""Keys of the site's node and its certificate: where they lie, and until when they hold.

::

    keys/node.pem        P-384, Flower's node key
    keys/tls.pem         P-256, the client key of TLS
    keys/client.pem      the certificate for it
    coordinator.pem      the coordinator's authority, as the invite pinned it
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CloisterError, FileUnreadable
from cloister_fl.membership.validity import AUTHORITY_DAYS, RENEW_DAYS, Validity
from cloister_fl.system.files import read_secret

NODE_KEY = "node.pem"
TLS_KEY = "tls.pem"
CERTIFICATE = "client.pem"
AUTHORITY = "coordinator.pem"


def own_validity(site: Site) -> Validity | None:
    """The dates of the site's certificate; None where the coordinator has not approved it yet.

    Raises:
        FileUnreadable: it is damaged, or others could have changed it.
    """
    return _validity(site, site.keys / CERTIFICATE)


def authority_validity(site: Site) -> Validity | None:
    """The dates of the coordinator's authority; None where none is pinned; raises as above."""
    return _validity(site, site.root / AUTHORITY)


def date_warnings(site: Site) -> tuple[str, ...]:
    """What a person at the site is told of certificates whose end is near, a sentence each.

    A certificate that cannot be read is a sentence, too.
    """
    try:
        own, authority = own_validity(site), authority_validity(site)
    except CloisterError as error:
        return (error.what,)
    found = []
    if own is not None and own.days_left() < RENEW_DAYS:
        found.append(f"This site's certificate {own.told()}. {renewal_remedy(own, site)}")
    if authority is not None and authority.days_left() < AUTHORITY_DAYS:
        found.append(
            f"The coordinator's authority {authority.told()}, and with it all certificates. "
            "Ask the coordinator when it is replaced."
        )
    return tuple(found)


def renewal_remedy(own: Validity, site: Site | None = None) -> str:
    """What to do about a certificate of the site whose end is near, or that has expired."""
    del own, site
    return "Ask the coordinator to enrol the site again, with a new folder and a new name."


def damaged() -> FileUnreadable:
    """The error of a certificate or key of the node that cannot be used."""
    return FileUnreadable(
        f"{CERTIFICATE} or {TLS_KEY} is damaged.",
        remedy="Restore it from the site's backup, or remove client.pem and join again.",
    )


def _validity(site: Site, path: Path) -> Validity | None:
    if not path.exists():
        return None
    try:
        return Validity.of(x509.load_pem_x509_certificate(read_secret(path)))
    except ValueError:
        raise damaged() from None
