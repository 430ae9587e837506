"""Unmasking of a sum: secrets are rebuilt from shares, checked, and their masks subtracted."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cloister_fl.errors import DealerBlamed
from cloister_fl.secagg.crypto import hashes, key_agreement, keystream, shamir
from cloister_fl.secagg.fixed_point import decode
from cloister_fl.secagg.messages.codec import Advertisement, Unmasked


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The sum of a round.

    Attributes:
        total: sum modulo 2**32 of the survivors' encodings, D words, two's complement.
        scale: units to one.
        survivors: U3, who is in the sum.
        weight: sum of the survivors' public weights.
    """

    total: NDArray[np.uint32]
    scale: float
    survivors: tuple[str, ...]
    weight: float

    def sum(self) -> NDArray[np.float32]:
        """Sum of weight times update, float32."""
        return decode(self.total, divisor=self.scale)

    def mean(self) -> NDArray[np.float32]:
        """Weighted mean of the updates, float32."""
        return decode(self.total, divisor=self.scale * self.weight)


def unmask(
    total: NDArray[np.uint32],
    *,
    records: Mapping[str, Advertisement],
    keys_digest: bytes,
    sid: bytes,
    u2: tuple[str, ...],
    u3: tuple[str, ...],
    replies: Mapping[str, Unmasked],
    threshold: int,
    threads: int,
) -> None:
    """Take all masks off ``total``, in place, once every secret has proved right.

    Args:
        total: sum of the masked vectors of U3.
        records: stage-0 records of U1, by rising site id.
        keys_digest: T.
        sid: the session.
        u2: sites whose masks are in the vectors.
        u3: sites whose vectors are in the sum.
        replies: at least ``threshold`` checked replies, by rising site id.
        threshold: t.
        threads: cores to use.

    Raises:
        DealerBlamed: t shares, each as its dealer signed it, rebuild something else than the
            secret behind the dealer's commitment or public key. No other t are tried: which
            would be right, none of them says.
    """
    rank = {site: x for x, site in enumerate(records, start=1)}
    holders = list(replies)[:threshold]
    u2_hash = hashes.set_hash(u2)
    made: list[keystream.Mask] = []
    b_shares = {holder: dict(replies[holder].b_shares) for holder in holders}
    for dealer in u3:
        shares = {rank[holder]: b_shares[holder][dealer] for holder in holders}
        record = records[dealer]
        b = _rebuild(dealer, shares, partial(_is_committed, record))
        made.append((key_agreement.self_mask_key(b, keys_digest, sid, u2_hash), -1))
    key_shares = {holder: dict(replies[holder].mask_key_shares) for holder in holders}
    for dealer in (site for site in u2 if site not in u3):
        shares = {rank[holder]: key_shares[holder][dealer] for holder in holders}
        record = records[dealer]
        mask_sk = _rebuild(dealer, shares, partial(_is_key_of, record))
        for peer in u3:
            shared = key_agreement.agree(mask_sk, records[peer].mask_pk)
            key = key_agreement.pair_mask_key(shared, keys_digest, (dealer, peer), sid, u2_hash)
            # The peer added this mask where its id is the smaller, and subtracted it otherwise.
            made.append((key, -1 if peer < dealer else 1))
    keystream.apply(total, made, threads=threads)


def _is_committed(record: Advertisement, b: bytes) -> bool:
    return hmac.compare_digest(hashes.commitment(record.kid, record.site, b), record.commitment)


def _is_key_of(record: Advertisement, mask_sk: bytes) -> bool:
    return hmac.compare_digest(key_agreement.public_of(mask_sk), record.mask_pk)


def _rebuild(dealer: str, shares: Mapping[int, bytes], is_right: Callable[[bytes], bool]) -> bytes:
    try:
        secret = shamir.rebuild(shares)
    except shamir.ShareInvalid:
        secret = b""
    if len(secret) != shamir.SECRET_BYTES or not is_right(secret):
        raise DealerBlamed(
            f"The shares that {dealer} dealt do not rebuild its secret.",
            why="Each is as it was signed, so the dealer sent wrong shares.",
            remedy="Have the site's steward find out why; the round has no sum.",
            blamed=dealer,
        )
    return secret
