from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.secagg.crypto import shamir


@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_t_shares_rebuild_the_secret(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    shares = shamir.split(secret, threshold=threshold, count=count, draw=os.urandom)
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    assert shamir.rebuild({x + 1: shares[x] for x in chosen}) == secret


def test_fewer_shares_say_nothing() -> None:
    """Below the threshold every secret is as likely: some polynomial passes through all."""
    secret = bytes(range(32))
    shares = shamir.split(secret, threshold=3, count=5, draw=os.urandom)
    for one, two in itertools.combinations(range(5), 2):
        other = int.from_bytes(os.urandom(32), "big")
        x1, x2 = one + 1, two + 1
        y1, y2 = (int.from_bytes(shares[i], "big") for i in (one, two))
        # The parabola with this other secret through both shares exists, so they exclude none.
        p = shamir.PRIME
        a1, a2 = (y1 - other) * pow(x1, -1, p) % p, (y2 - other) * pow(x2, -1, p) % p
        slope = (a2 - a1) * pow(x2 - x1, -1, p) % p
        linear = (a1 - slope * x1) % p
        assert (other + linear * x1 + slope * x1 * x1) % p == y1
        assert (other + linear * x2 + slope * x2 * x2) % p == y2


def test_shares_are_fresh_each_time() -> None:
    one, two = (shamir.split(bytes(32), threshold=2, count=3, draw=os.urandom) for _ in range(2))
    assert not set(one) & set(two)


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_secret_of_another_length(secret: bytes) -> None:
    with pytest.raises(shamir.ShareInvalid):
        shamir.split(secret, threshold=2, count=3, draw=os.urandom)


@pytest.mark.parametrize(("threshold", "count"), [(0, 3), (4, 3)])
def test_threshold_out_of_range(threshold: int, count: int) -> None:
    with pytest.raises(shamir.ShareInvalid):
        shamir.split(bytes(32), threshold=threshold, count=count, draw=os.urandom)


def test_share_at_or_above_p() -> None:
    for value in (shamir.PRIME, shamir.PRIME + 1, 2**264 - 1):
        with pytest.raises(shamir.ShareInvalid):
            shamir.rebuild({1: value.to_bytes(33, "big"), 2: bytes(33)})


def test_secret_at_or_above_two_to_256() -> None:
    """With t = 1 the share is the secret."""
    assert shamir.rebuild({1: (2**256 - 1).to_bytes(33, "big")}) == b"\xff" * 32
    for value in (2**256, shamir.PRIME - 1):
        with pytest.raises(shamir.ShareInvalid):
            shamir.rebuild({1: value.to_bytes(33, "big")})


def test_share_of_another_length() -> None:
    with pytest.raises(shamir.ShareInvalid):
        shamir.rebuild({1: bytes(32)})


def test_the_least_prime_above_two_to_256() -> None:
    def passes(candidate: int) -> bool:
        return all(pow(base, candidate - 1, candidate) == 1 for base in (2, 3, 5, 7))

    assert [k for k in range(1, 298) if passes(2**256 + k)] == [297]
