"""The published vectors: made again from their seeds, replayed without them, and spoilt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_fl.errors import TranscriptMismatch
from cloister_fl.secagg.messages.codec import Masked, decode
from cloister_fl.secagg.transcript import replay
from support.secagg_vectors import CASES, DIMENSION, play

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg"


def text_of(case: str) -> str:
    return (FOLDER / f"{case}.json").read_text("utf-8")


@pytest.mark.parametrize("case", CASES)
def test_made_again_from_the_seeds(case: str) -> None:
    assert play(case) == text_of(case)


@pytest.mark.parametrize("case", CASES)
def test_replay(case: str) -> None:
    aggregate = replay(text_of(case))
    data = json.loads(text_of(case))
    notes = data["notes"]["sites"]
    absent = set(CASES[case][2])
    assert set(aggregate.survivors) == set(notes) - absent
    total = np.zeros(DIMENSION, np.int64)
    for name in aggregate.survivors:
        value = np.asarray(notes[name]["update"]) * notes[name]["weight"] * aggregate.scale
        total += np.rint(value).astype(np.int64)
    assert np.array_equal(total, aggregate.total.view(np.int32))


def lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=salt, info=info).derive(secret)


def stream(key: bytes) -> np.ndarray:
    made = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(64))
    return np.frombuffer(made, "<u4").astype(np.int64)


def listed(items: list[bytes]) -> bytes:
    return len(items).to_bytes(4, "big") + lp(*items)


@pytest.mark.parametrize("case", CASES)
def test_vectors_by_another_hand(case: str) -> None:
    """y of every site, written out from the specification with nothing of the package."""
    data: dict[str, Any] = json.loads(text_of(case))
    notes = data["notes"]["sites"]
    entries = data["messages"]
    raw = [bytes.fromhex(e["bytes"]) for e in entries if e["message"] == "advertise"]
    head = len(lp(b"secagg/v2", b"advertise"))
    kid = raw[0][head + 8 : head + 40]
    label = b"secagg/v2/T"
    t_digest = hashlib.sha256(lp(label, kid, listed([r[head:] for r in raw]))).digest()
    names = sorted(notes)
    u2 = hashlib.sha256(lp(b"secagg/v2/set", listed([n.encode() for n in names]))).digest()
    public = {
        name: X25519PrivateKey.from_private_bytes(bytes.fromhex(notes[name]["mask_sk"]))
        .public_key()
        .public_bytes_raw()
        for name in names
    }
    scale = data["outcome"]["scale"]
    for entry in entries:
        if entry["message"] != "mask":
            continue
        masked = decode(bytes.fromhex(entry["bytes"]))
        assert isinstance(masked, Masked)
        name, note = entry["site"], notes[entry["site"]]
        y = np.rint(np.asarray(note["update"]) * note["weight"] * scale).astype(np.int64)
        y += stream(hkdf(bytes.fromhex(note["b"]), t_digest, lp(b"self", masked.sid, u2)))
        secret = X25519PrivateKey.from_private_bytes(bytes.fromhex(note["mask_sk"]))
        for peer in names:
            if peer != name:
                shared = secret.exchange(X25519PublicKey.from_public_bytes(public[peer]))
                pair = listed([n.encode() for n in sorted((name, peer))])
                key = hkdf(shared, t_digest, lp(b"pair", pair, masked.sid, u2))
                y += stream(key) * (1 if name < peer else -1)
        assert np.array_equal((y % 2**32).astype(np.uint32), np.frombuffer(masked.vector, "<u4"))


def test_spoilt_transcripts() -> None:
    data = json.loads(text_of("n5-dropout"))
    for number in range(0, len(data["messages"]), 3):
        spoilt = json.loads(text_of("n5-dropout"))
        entry = spoilt["messages"][number]
        last = int(entry["bytes"][-2:], 16) ^ 1
        entry["bytes"] = entry["bytes"][:-2] + f"{last:02x}"
        with pytest.raises(TranscriptMismatch):
            replay(json.dumps(spoilt))
    for key, value in (("total", "00" * 64), ("survivors", ["site-01"]), ("scale", 2.0)):
        spoilt = json.loads(text_of("n5-dropout"))
        spoilt["outcome"][key] = value
        with pytest.raises(TranscriptMismatch):
            replay(json.dumps(spoilt))
    for text in ("", "[]", "{}", '{"format": 1}', text_of("n5")[:-9]):
        with pytest.raises(TranscriptMismatch):
            replay(text)
