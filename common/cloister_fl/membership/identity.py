"""Ed25519 identities (RFC 8032), which sign messages independently of the transport.

A site makes its key itself and never sends it. Flower's node key signs a time stamp only, so
whatever matters is signed here, over its content and under a label.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister_fl.encoding.framing import Buffer, frame
from cloister_fl.errors import IdentityInvalid

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_FIELD = 2**255 - 19
# The y of the eight points whose order divides 8 (RFC 7748, section 4.1, the curve's cofactor):
# with such a key, one signature fits every message.
_ORDER_EIGHT_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y = frozenset({0, 1, _FIELD - 1, _ORDER_EIGHT_Y, _FIELD - _ORDER_EIGHT_Y})


class Identity:
    """A private Ed25519 key and what may be done with it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        """The public key, 32 bytes."""

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.from_private_bytes(os.urandom(KEY_BYTES)))

    def sign(self, label: str, *fields: Buffer) -> bytes:
        """Sign a label and fields; 64 bytes."""
        return self._key.sign(frame(label.encode(), *fields))

    def to_pem(self) -> bytes:
        """PKCS #8 PEM, not encrypted: for its owner's disk only, see ``files.create_secret``."""
        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @classmethod
    def from_pem(cls, pem: bytes) -> Identity:
        """Read what ``to_pem`` wrote.

        Raises:
            IdentityInvalid: it is not an Ed25519 key in PEM.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityInvalid(
                "The identity key is not an Ed25519 key in PEM.",
                remedy="Restore the file; a new key must be confirmed by every other site.",
            )
        return cls(key)


def verify(public: bytes, signature: bytes, label: str, *fields: Buffer) -> bool:
    """True where ``signature`` is that of ``public`` over the label and fields."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, frame(label.encode(), *fields))
    except (InvalidSignature, ValueError):
        return False
    return True


def usable_public_key(public: bytes) -> bool:
    """True for 32 bytes that are canonical and not a point of small order."""
    if len(public) != KEY_BYTES:
        return False
    y = int.from_bytes(public, "little") & (2**255 - 1)
    return y < _FIELD and y not in _SMALL_ORDER_Y


def fingerprint(public: bytes) -> str:
    """What two people compare by telephone: 32 hexadecimal digits of SHA-256 in groups of four."""
    text = hashlib.sha256(public).hexdigest()[:32]
    return " ".join(text[start : start + 4] for start in range(0, 32, 4))
