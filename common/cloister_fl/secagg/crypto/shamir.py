"""Shamir's secret sharing (CACM 22(11), 1979) over the prime p = 2^256 + 297.

A secret is 32 bytes, a share 33. The prime is the least above 2^256, so every 32-byte string is
a secret as it stands. Python's integers do not run in constant time; the parties that compute
here hold the secret anyway, and timing is outside the model (see ``docs/secure-aggregation.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_DRAW_BYTES = 65  # 520 bits, reduced modulo p: within 2**-263 of uniform


class ShareInvalid(ValueError):
    """A share or a rebuilt secret out of range; the caller assigns the blame."""


def split(
    secret: bytes, *, threshold: int, count: int, draw: Callable[[int], bytes]
) -> tuple[bytes, ...]:
    """Deal ``count`` shares, the i-th (from 0) being the polynomial at x = i + 1.

    Args:
        secret: 32 bytes.
        threshold: shares that rebuild it, 1 to ``count``.
        count: shares dealt.
        draw: source of that many random bytes.

    Raises:
        ShareInvalid: a secret of another length, or a threshold out of range.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count < PRIME:
        raise ShareInvalid("a secret or threshold is out of range")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(draw(_DRAW_BYTES), "big") % PRIME for _ in range(threshold - 1)]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return tuple(shares)


def rebuild(shares: Mapping[int, bytes]) -> bytes:
    """Rebuild the secret from shares by their x, as many as the threshold; 32 bytes.

    Raises:
        ShareInvalid: a share that is not below p, or a secret that is not below 2**256.
    """
    points = {x: int.from_bytes(share, "big") for x, share in shares.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ShareInvalid("a share has another length")
    if any(value >= PRIME for value in points.values()) or any(x < 1 for x in points):
        raise ShareInvalid("a share is out of range")
    places = tuple(points)
    weights = _weights_at_zero(places)
    secret = sum(weights[x] * points[x] for x in places) % PRIME
    if secret >= 2**256:
        raise ShareInvalid("the secret is out of range")
    return secret.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=16)
def _weights_at_zero(places: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights; public, and the same for every secret that one set of holders shares."""
    weights = {}
    for x in places:
        above = below = 1
        for other in places:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights[x] = above * pow(below, -1, PRIME) % PRIME
    return weights
