"""Ed25519 identities (RFC 8032): who wrote a message, whatever carried it.

A site makes its key itself and never sends it. Flower's node key signs a time stamp only, so
whatever matters is signed here, over its content and under a label.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister_common.errors import FileUnreadable, IdentityInvalid, OutputInTheWay
from cloister_common.framing import Buffer, frame

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
        """PKCS #8 PEM, not encrypted: for the site's own disk only."""
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
        except (ValueError, TypeError):
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


def save_identity(path: Path, identity: Identity) -> None:
    """Write a new key file, mode 0600; an existing file is never replaced.

    Raises:
        OutputInTheWay: the file exists.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OutputInTheWay(
            f"{path.name} exists; a key is never replaced.", remedy="Keep it, or move it away."
        ) from None
    with os.fdopen(handle, "wb") as file:
        file.write(identity.to_pem())
        file.flush()
        os.fsync(file.fileno())


def load_identity(path: Path) -> Identity:
    """Read a key file that only its owner can read.

    Raises:
        FileUnreadable: it cannot be read.
        IdentityInvalid: others may read it, or it is not a key.
    """
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()
    except OSError:
        raise FileUnreadable(
            f"{path.name} cannot be read.", remedy="Check the path and its permissions."
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        raise IdentityInvalid(
            f"{path.name} can be read by others than its owner.",
            why="Whoever holds the key can sign in this site's name.",
            remedy=f"Run: chmod 600 {path.name}",
        )
    return Identity.from_pem(pem)
