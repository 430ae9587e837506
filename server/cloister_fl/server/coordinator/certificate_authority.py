"""The coordinator's certificate authority (RFC 5280): its own server and enrolled sites, no more.

The authority signs keys, never names that a site chose: a client's certificate says which site
the coordinator approved, and the database decides whether it still holds. All keys are P-256.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.validity import RENEW_DAYS, Validity
from cloister_fl.system import utc
from cloister_fl.system.files import create_secret, read_secret

CA_KEY = "ca.key"
CA_CERTIFICATE = "ca.pem"
AUTHORITY_YEARS = 10
LEAF_DAYS = 730
"""How long a server's or a site's certificate holds."""

_CLOCK_SKEW = datetime.timedelta(hours=1)


class Authority:
    """The authority of one federation, opened with its private key.

    Raises:
        FileUnreadable: the key or certificate is missing, or others can read the key.
        IdentityInvalid: the file holds no P-256 key.
    """

    def __init__(self, folder: Path) -> None:
        self._key = ec_keys.load_private(read_secret(folder / CA_KEY), Purpose.TLS)
        self.certificate = x509.load_pem_x509_certificate(read_secret(folder / CA_CERTIFICATE))

    @classmethod
    def create(cls, folder: Path, federation: str) -> Authority:
        """Make the key and certificate where they are missing, and open them."""
        create_secret(folder / CA_KEY, ec_keys.generate_pem(Purpose.TLS))
        key = ec_keys.load_private(read_secret(folder / CA_KEY), Purpose.TLS)
        create_secret(folder / CA_CERTIFICATE, pem(_of_itself(key, federation)))
        return cls(folder)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate, 32 bytes: what an invite pins."""
        return self.certificate.fingerprint(hashes.SHA256())

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether it signed a certificate."""
        return is_issued_by(certificate, self.certificate)

    def server_certificate(
        self, key: ec.EllipticCurvePublicKey, hosts: Iterable[str]
    ) -> x509.Certificate:
        """Certify the server's key for these host names and IP addresses."""
        names = tuple(dict.fromkeys(hosts))
        return (
            self._leaf(key, "coordinator", ExtendedKeyUsageOID.SERVER_AUTH)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in names]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )

    def site_certificate(self, key: ec.EllipticCurvePublicKey, site: str) -> x509.Certificate:
        """Certify a site's TLS key, as a client."""
        return self._leaf(key, site, ExtendedKeyUsageOID.CLIENT_AUTH).sign(
            self._key, hashes.SHA256()
        )

    def _leaf(
        self, key: ec.EllipticCurvePublicKey, name: str, use: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        authority = self.certificate
        # What outlived its authority would be believed by nobody.
        ends = min(utc.now() + datetime.timedelta(days=LEAF_DAYS), Validity.of(authority).ends)
        return (
            _builder(_name(name), authority.subject, key, ends=ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def pem(certificate: x509.Certificate) -> bytes:
    """PEM of a certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority's key signed a certificate, and its name is the issuer's."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def needs_renewal(
    certificate: x509.Certificate, hosts: Iterable[str], authority: Authority
) -> bool:
    """True where a server's certificate ends soon, is for other hosts or of another authority."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ends_soon = Validity.of(certificate).days_left() < RENEW_DAYS
    other_hosts = set(names) != {_general_name(host) for host in hosts}
    return ends_soon or other_hosts or not authority.issued(certificate)


def _of_itself(key: ec.EllipticCurvePrivateKey, federation: str) -> x509.Certificate:
    """An authority's own certificate."""
    name = _name(f"{federation} authority")
    usage = _usage(key_cert_sign=True, crl_sign=True, digital_signature=False)
    ends = utc.now() + datetime.timedelta(days=365 * AUTHORITY_YEARS)
    return (
        _builder(name, name, key.public_key(), ends=ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc.now() - _CLOCK_SKEW)
        .not_valid_after(ends)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(
    *, digital_signature: bool = True, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
