"""Elliptic-curve keys of a site (FIPS 186-5): P-384 for Flower's node, P-256 for TLS.

They prove who is on the line. What matters in content is signed with the Ed25519 identity; see
``identity``.
"""

from __future__ import annotations

import enum

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister_fl.encoding.framing import Buffer, frame
from cloister_fl.errors import IdentityInvalid


class Purpose(enum.Enum):
    """What a key is for, which fixes its curve."""

    NODE = "node"
    TLS = "TLS"


_CURVES: dict[Purpose, type[ec.EllipticCurve]] = {
    Purpose.NODE: ec.SECP384R1,
    Purpose.TLS: ec.SECP256R1,
}


def generate_pem(purpose: Purpose) -> bytes:
    """A new private key, PKCS #8 PEM, not encrypted: for its owner's disk only."""
    return ec.generate_private_key(_CURVES[purpose]()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_private(pem: bytes, purpose: Purpose) -> ec.EllipticCurvePrivateKey:
    """Read what ``generate_pem`` wrote.

    Raises:
        IdentityInvalid: it is no private key on the purpose's curve.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(
        key.curve, _CURVES[purpose]
    ):
        raise IdentityInvalid(
            f"The {purpose.value} key is not a {_CURVES[purpose].name} key in PEM.",
            remedy="Restore the file; a site with another key must be enrolled again.",
        )
    return key


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SubjectPublicKeyInfo in PEM: the bytes that Flower knows a node by."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_public(pem: bytes, purpose: Purpose) -> ec.EllipticCurvePublicKey | None:
    """Read what ``public_pem`` wrote; ``None`` for anything else, other spellings included.

    One key must have one spelling: it is compared as bytes.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return None
    again = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return key if isinstance(key.curve, _CURVES[purpose]) and again == pem else None


def sign(key: ec.EllipticCurvePrivateKey, label: str, *fields: Buffer) -> bytes:
    """ECDSA with SHA-256 over a label and fields, DER."""
    return key.sign(frame(label.encode(), *fields), ec.ECDSA(hashes.SHA256()))


def verify(key: ec.EllipticCurvePublicKey, signature: bytes, label: str, *fields: Buffer) -> bool:
    """True where ``signature`` is that of ``key`` over the label and fields."""
    try:
        key.verify(signature, frame(label.encode(), *fields), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True
