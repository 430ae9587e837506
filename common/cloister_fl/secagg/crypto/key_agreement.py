"""Keys of an epoch: X25519 agreements, and HKDF into keys of one purpose and one use.

X25519 is RFC 7748, HKDF with SHA-256 is RFC 5869, ChaCha20-Poly1305 is RFC 8439.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_fl.encoding.framing import frame, names

KEY_BYTES = 32

_FIELD = 2**255 - 19
# Any scalar finds a point of low order: clamping makes it a multiple of the cofactor.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(range(32)))
# A key seals one box, so the nonce never repeats under it.
_NONCE = bytes(12)


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes) -> bytes:
    """The X25519 shared secret, 32 bytes.

    Raises:
        ValueError: ``public`` is of low order or not 32 bytes.
    """
    key = X25519PrivateKey.from_private_bytes(secret)
    return key.exchange(X25519PublicKey.from_public_bytes(public))


def full_order(public: bytes) -> bool:
    """True for a canonical X25519 key outside the subgroup of order 8 (RFC 7748, section 6.1).

    Two encodings of one key would pass for two keys, so only the canonical one is taken.
    """
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD:
        return False
    try:
        _PROBE.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def derive(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 (RFC 5869) to 32 bytes."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=info).derive(secret)


def box_key(shared: bytes, keys: bytes, sender: str, receiver: str) -> bytes:
    """Key of the one box that ``sender`` seals for ``receiver`` in the epoch of ``T`` = keys."""
    return derive(shared, salt=keys, info=frame(b"share", sender.encode(), receiver.encode()))


def self_mask_key(secret: bytes, keys: bytes, sid: bytes, u2: bytes) -> bytes:
    """Key of a site's own mask; ``u2`` is the hash of U2."""
    return derive(secret, salt=keys, info=frame(b"self", sid, u2))


def pair_mask_key(
    shared: bytes, keys: bytes, pair: tuple[str, str], sid: bytes, u2: bytes
) -> bytes:
    """Key of the mask of two sites, the same for both; ``u2`` is the hash of U2."""
    return derive(shared, salt=keys, info=frame(b"pair", names(sorted(pair)), sid, u2))


def seal(key: bytes, keys: bytes, sender: str, receiver: str, content: bytes) -> bytes:
    """ChaCha20-Poly1305 with AAD (T, from, to); 16 bytes longer than the content."""
    aad = frame(keys, sender.encode(), receiver.encode())
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, aad)


def unseal(key: bytes, keys: bytes, sender: str, receiver: str, box: bytes) -> bytes | None:
    """Open a box; ``None`` where it does not authenticate."""
    aad = frame(keys, sender.encode(), receiver.encode())
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, aad)
    except (InvalidTag, ValueError):
        return None
