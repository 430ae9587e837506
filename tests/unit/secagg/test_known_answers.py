"""The primitives against vectors of the standards that define them (files, not our own)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_fl.membership.identity import usable_public_key
from cloister_fl.secagg.crypto import hashes, key_agreement
from cloister_fl.secagg.crypto import keystream as masks

VECTORS = json.loads(
    (Path(__file__).parents[2] / "vectors" / "known-answers.json").read_text("utf-8")
)


def of(name: str) -> list[dict[str, bytes]]:
    return [{key: bytes.fromhex(text) for key, text in row.items()} for row in VECTORS[name]]


@pytest.mark.parametrize("row", of("aes-256-ctr"))
def test_ctr(row: dict[str, bytes]) -> None:
    cipher = Cipher(algorithms.AES(row["key"]), modes.CTR(row["counter"])).encryptor()
    assert cipher.update(row["plaintext"]) == row["ciphertext"]


def keystream(key: bytes, words: int) -> np.ndarray:
    """Counter mode written out: each block is the block cipher of its number."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(-(-words // 4)))
    return np.frombuffer(blocks, "<u4")[:words]


@pytest.mark.parametrize("row", of("aes-256-ctr"))
def test_mask_is_the_counter_mode_of_that_cipher(row: dict[str, bytes]) -> None:
    accumulator = np.zeros(1003, np.uint32)
    masks.apply(accumulator, [(row["key"], 1)])
    assert np.array_equal(accumulator, keystream(row["key"], 1003))


def test_fixed_output_of_the_mask_generator() -> None:
    """AES-256 of the zero block under the zero key, read as little-endian words."""
    accumulator = np.zeros(4, np.uint32)
    masks.apply(accumulator, [(bytes(32), 1)])
    assert accumulator.astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    masks.apply(accumulator, [(bytes(32), -1)])
    assert not accumulator.any()


@pytest.mark.parametrize("row", of("x25519"))
def test_x25519(row: dict[str, bytes]) -> None:
    # RFC 7748 has the receiver clear the top bit of u, which the canonical form never sets.
    assert key_agreement.agree(row["scalar"], row["u"]) == row["out"]


@pytest.mark.parametrize("row", of("ed25519"))
def test_ed25519(row: dict[str, bytes]) -> None:
    key = Ed25519PrivateKey.from_private_bytes(row["secret"])
    assert key.public_key().public_bytes_raw() == row["public"]
    assert usable_public_key(row["public"])
    assert key.sign(row["message"]) == row["signature"]
    Ed25519PublicKey.from_public_bytes(row["public"]).verify(row["signature"], row["message"])


@pytest.mark.parametrize("row", of("hkdf-sha256"))
def test_hkdf(row: dict[str, bytes]) -> None:
    made = HKDF(SHA256(), len(row["okm"]), salt=row["salt"], info=row["info"]).derive(row["ikm"])
    assert made == row["okm"]
    assert key_agreement.derive(row["ikm"], salt=row["salt"], info=row["info"]) == row["okm"][:32]


@pytest.mark.parametrize("row", of("chacha20-poly1305"))
def test_chacha20_poly1305(row: dict[str, bytes]) -> None:
    cipher = ChaCha20Poly1305(row["key"])
    sealed = cipher.encrypt(row["nonce"], row["plaintext"], row["aad"])
    assert sealed == row["ciphertext"] + row["tag"]


def repeating(length: int) -> bytes:
    """The input of BLAKE3's own vectors: 0, 1, ..., 250, 0, 1, ..."""
    return bytes(range(251)) * (length // 251) + bytes(range(length % 251))


@pytest.mark.parametrize("row", of("blake3"), ids=lambda row: str(int(row["length"].hex(), 16)))
def test_blake3(row: dict[str, bytes]) -> None:
    data = repeating(int.from_bytes(row["length"], "big"))
    assert blake3(data).digest() == row["hash"]


def test_bulk_hashes_are_blake3_of_the_frame() -> None:
    data = repeating(70_001)
    for hashed, label in (
        (hashes.vector_hash(data), b"secagg/v2/vector"),
        (hashes.model_hash(memoryview(data)), b"secagg/v2/model"),
    ):
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in (label, data))
        assert hashed == blake3(framed).digest()
