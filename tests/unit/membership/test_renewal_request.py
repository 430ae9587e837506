"""A renewal's request proves all of its keys, for one certificate at one coordinator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister_fl.errors import MessageInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.renewal_request import MAX_RENEWAL_BYTES, Renewal
from support.errors import raises

IDENTITY, OTHER = Identity.generate(), Identity.generate()
KEYS = (ec_keys.generate_pem(Purpose.NODE), ec_keys.generate_pem(Purpose.TLS))
MORE = (ec_keys.generate_pem(Purpose.NODE), ec_keys.generate_pem(Purpose.TLS))
SHOWN, AUTHORITY, ROOT = b"s" * 32, b"a" * 32, b"r" * 32


def _made(identity: Identity = IDENTITY, keys: tuple[bytes, bytes] = KEYS) -> Renewal:
    return Renewal.make("north", identity, keys, shown=SHOWN, authority=AUTHORITY, root=ROOT)


def test_what_was_made_is_read_and_proven() -> None:
    made = _made()
    data = made.encode()
    assert len(data) < MAX_RENEWAL_BYTES
    assert Renewal.decode(data) == made
    assert made.proven(IDENTITY.public, SHOWN, AUTHORITY, ROOT)


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_taken_elsewhere_it_proves_nothing(changed: int) -> None:
    said = [IDENTITY.public, SHOWN, AUTHORITY, ROOT]
    said[changed] = OTHER.public if changed == 0 else b"x" * 32
    assert not _made().proven(*said)


def test_the_holder_of_the_certificate_alone_cannot_sign_it() -> None:
    assert not _made(OTHER).proven(IDENTITY.public, SHOWN, AUTHORITY, ROOT)


def test_keys_that_somebody_else_holds_are_not_proven() -> None:
    mine, theirs = _made(), _made(keys=MORE)
    for name in ("node_key", "tls_key"):
        taken = replace(mine, **{name: getattr(theirs, name)})
        assert not taken.proven(IDENTITY.public, SHOWN, AUTHORITY, ROOT)
    for number in range(3):
        proofs = list(mine.proofs)
        proofs[number] = theirs.proofs[number]
        forged = replace(mine, proofs=(proofs[0], proofs[1], proofs[2]))
        assert not forged.proven(IDENTITY.public, SHOWN, AUTHORITY, ROOT)
    swapped = replace(mine, node_key=mine.tls_key, tls_key=mine.node_key)
    assert not swapped.proven(IDENTITY.public, SHOWN, AUTHORITY, ROOT)


def test_what_is_longer_than_a_request_is_not_parsed() -> None:
    long = replace(_made(), node_key=b"k" * MAX_RENEWAL_BYTES)
    for data in (long.encode(), b"", _made().encode() + b"\0", b"\xff" * 64):
        with raises(MessageInvalid):
            Renewal.decode(data)
