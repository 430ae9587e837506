"""Sharing of a dealer's two secrets (stage 1): each share is hashed, signed and sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cloister_fl.membership.identity import Identity
from cloister_fl.secagg.crypto import hashes, key_agreement, shamir
from cloister_fl.secagg.messages.codec import Advertisement, Dealing, DealtTo, Shares


def deal(
    dealer: str,
    identity: Identity,
    *,
    records: Mapping[str, Advertisement],
    epoch_keys: bytes,
    threshold: int,
    enc_sk: bytes,
    secrets: tuple[bytes, bytes],
    draw: Callable[[int], bytes],
) -> tuple[Shares, dict[str, tuple[bytes, bytes]]]:
    """Deal b and mask_sk among U1; the message, and both shares of each site.

    Args:
        dealer: the dealing site.
        identity: its identity key.
        records: stage-0 records of U1, by rising site id; a site's rank is its share's x.
        epoch_keys: T.
        threshold: t.
        enc_sk: the dealer's X25519 secret for boxes.
        secrets: b and mask_sk, 32 bytes each.
        draw: source of that many random bytes.
    """
    b_shares, key_shares = (
        shamir.split(secret, threshold=threshold, count=len(records), draw=draw)
        for secret in secrets
    )
    kid = records[dealer].kid
    given: dict[str, tuple[bytes, bytes]] = {}
    dealt, boxes = [], []
    for holder, b_share, key_share in zip(records, b_shares, key_shares, strict=True):
        box = b""
        given[holder] = (b_share, key_share)
        if holder != dealer:
            shared = key_agreement.agree(enc_sk, records[holder].enc_pk)
            key = key_agreement.box_key(shared, epoch_keys, dealer, holder)
            box = key_agreement.seal(key, epoch_keys, dealer, holder, b_share + key_share)
            boxes.append((holder, box))
        dealt.append(
            DealtTo(
                holder,
                hashes.box_hash(epoch_keys, dealer, holder, box),
                hashes.share_hash(epoch_keys, hashes.OF_B, dealer, holder, b_share),
                hashes.share_hash(epoch_keys, hashes.OF_MASK_KEY, dealer, holder, key_share),
            )
        )
    dealing = Dealing(dealer, tuple(dealt)).signed_by(identity, epoch_keys)
    return Shares(kid, dealing, tuple(boxes)), given
