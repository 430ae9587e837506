from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister_fl.errors import IdentityInvalid
from cloister_fl.membership.identity import Identity, fingerprint, usable_public_key, verify
from cloister_fl.system.files import create_secret, read_secret


def test_signature_is_for_one_label_and_one_split_of_fields() -> None:
    identity = Identity.generate()
    mark = identity.sign("label", b"ab", b"c")
    assert verify(identity.public, mark, "label", b"ab", b"c")
    assert not verify(identity.public, mark, "other", b"ab", b"c")
    assert not verify(identity.public, mark, "label", b"a", b"bc")
    assert not verify(identity.public, mark, "label", b"abc")
    assert not verify(Identity.generate().public, mark, "label", b"ab", b"c")
    assert not verify(identity.public, mark[:-1], "label", b"ab", b"c")
    assert not verify(b"short", mark, "label", b"ab", b"c")


def test_a_key_survives_its_file(tmp_path: Path) -> None:
    identity = Identity.generate()
    create_secret(tmp_path / "key", identity.to_pem())
    assert Identity.from_pem(read_secret(tmp_path / "key")).public == identity.public


def test_file_that_is_no_key() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for content in (b"", b"not a key", other):
        with pytest.raises(IdentityInvalid):
            Identity.from_pem(content)


@pytest.mark.parametrize(
    "text",
    [
        "00" * 32,
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        "00" * 31,
    ],
)
def test_keys_that_fit_every_message(text: str) -> None:
    """Points of small order, or not canonical, or too short."""
    assert not usable_public_key(bytes.fromhex(text))


def test_fingerprint_is_for_the_telephone() -> None:
    public = Identity.generate().public
    groups = fingerprint(public).split(" ")
    assert len(groups) == 8
    assert {len(group) for group in groups} == {4}
    assert fingerprint(public) != fingerprint(os.urandom(32))
