"""Keys of the site's node and its certificate: where they lie, and until when they hold.

::

    keys/node.pem        P-384, Flower's node key, as it was enrolled
    keys/tls.pem         P-256, the client key of TLS, likewise
    keys/client.pem      the certificate; once it was renewed, with both of its keys behind it
    coordinator.pem      the coordinator's authority, as the invite pinned it

A renewal replaces certificate and keys together, and whatever it is killed at, they must fit each
other. So they are in one file then, and the file is replaced by one rename.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.errors import CloisterError, FileUnreadable
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.validity import AUTHORITY_DAYS, RENEW_DAYS, Validity
from cloister_fl.system.files import read_secret

NODE_KEY = "node.pem"
TLS_KEY = "tls.pem"
CERTIFICATE = "client.pem"
AUTHORITY = "coordinator.pem"
_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\n[^-]+-----END PRIVATE KEY-----\n")


@dataclass(frozen=True)
class Credentials:
    """What a site shows and signs with on its connections, in PEM.

    Attributes:
        certificate: for the TLS key.
        tls_key, node_key: the private keys.
        together: whether all three are in one file, as after a renewal.
    """

    certificate: bytes
    tls_key: bytes = field(repr=False)
    node_key: bytes = field(repr=False)
    together: bool

    def encode(self) -> bytes:
        """All three as one file, see ``decode``."""
        return self.certificate + self.tls_key + self.node_key

    @classmethod
    def decode(cls, data: bytes) -> Credentials | None:
        """Read what ``encode`` wrote; ``None`` for anything else, a certificate alone included."""
        keys = _KEY.findall(data)
        certificate = _KEY.sub(b"", data)
        if len(keys) != 2 or certificate + b"".join(keys) != data:
            return None
        return cls(certificate, keys[0], keys[1], together=True)


def credentials(site: Site) -> Credentials:
    """The certificate and the keys in force.

    Raises:
        FileUnreadable: a file is missing, or others could have read or changed it.
    """
    data = read_secret(site.keys / CERTIFICATE)
    one = Credentials.decode(data)
    if one is not None:
        return one
    tls, node = (read_secret(site.keys / name) for name in (TLS_KEY, NODE_KEY))
    return Credentials(data, tls, node, together=False)


def node_key(site: Site) -> ec.EllipticCurvePrivateKey:
    """The node key in force; raises as ``credentials``, and IdentityInvalid where it is no key."""
    return ec_keys.load_private(credentials(site).node_key, Purpose.NODE)


def show_certificate(site: Site, context: ssl.SSLContext) -> None:
    """Have the connections of a context show the site's certificate.

    Raises:
        FileUnreadable: see ``credentials``.
        ssl.SSLError: certificate and key do not fit, or are damaged.
    """
    together = credentials(site).together
    context.load_cert_chain(site.keys / CERTIFICATE, None if together else site.keys / TLS_KEY)


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


def renewal_remedy(own: Validity, site: Site | None = None, now: float | None = None) -> str:
    """What to do about a certificate of the site whose end is near, or that has expired."""
    root = site.root if site is not None else None
    if own.days_left(now) > 0:
        return (
            "The running service renews it by itself. To do it now, and see what is in the way: "
            + command_at(root, "renew")
        )
    return (
        "It cannot be renewed any more. Ask the coordinator to revoke this site and to invite it "
        "again, then join with new keys; the ledger stays: "
        + command_at(root, "join INVITE-FILE --new-keys")
    )


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
