"""Hashes that bind messages to each other, each under its label (see ``framing``).

Where one signature covers many rows of which each must prove itself alone, it is over the root of a
Merkle tree: that of RFC 6962, section 2.1, with SHA-256. A leaf's hash and a node's begin with
different bytes, and a node without a sibling goes up as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from cloister_fl.encoding.framing import Buffer, bulk_digest, digest, listed, names

ADVERTISE = "secagg/v2/sign/advertise"
SHARE = "secagg/v2/sign/share"
MASKED = "secagg/v2/sign/y"
CONSISTENT = "secagg/v2/sign/u3"
UNMASK = "secagg/v2/sign/unmask"
ABORT = "secagg/v2/sign/abort"
COMPLAINT = "secagg/v2/sign/complaint"
DISCLOSURE = "secagg/v2/sign/disclosure"

Levels = tuple[tuple[bytes, ...], ...]
"""The hashes of a tree's leaves, of their parents, and so on up to the root alone."""
_HASH, _LEAF, _NODE = 32, b"\0", b"\1"

OF_B = "b"
OF_MASK_KEY = "mask_sk"


def keys_digest(kid: bytes, records: Iterable[bytes]) -> bytes:
    """T: the complete signed stage-0 records of U1, in order of site id; 32 bytes.

    It does not depend on the model, so keys and boxes can be sent ahead of it.
    """
    return digest("secagg/v2/T", kid, listed(records))


def commitment(kid: bytes, site: str, secret: bytes) -> bytes:
    """The commitment to b of stage 0; 32 bytes."""
    return digest("secagg/v2/b", kid, site.encode(), secret)


def set_hash(sites: Iterable[str]) -> bytes:
    """Hash of a set of sites, in rising order; 32 bytes."""
    return digest("secagg/v2/set", names(sites))


def share_hash(keys: bytes, kind: str, dealer: str, holder: str, share: bytes) -> bytes:
    """Hash of one share, which its dealer signs; 32 bytes."""
    return digest("secagg/v2/share", keys, kind.encode(), dealer.encode(), holder.encode(), share)


def box_hash(keys: bytes, dealer: str, holder: str, box: bytes) -> bytes:
    """Hash of one sealed box, which its dealer signs; 32 bytes."""
    return digest("secagg/v2/box", keys, dealer.encode(), holder.encode(), box)


def vector_hash(vector: Buffer) -> bytes:
    """Hash of a masked vector's bytes, by BLAKE3; 32 bytes."""
    return bulk_digest("secagg/v2/vector", vector)


def model_hash(model: Buffer) -> bytes:
    """Hash of the global model's bytes as they were received, by BLAKE3; 32 bytes."""
    return bulk_digest("secagg/v2/model", model)


def levels(rows: Sequence[bytes]) -> Levels:
    """Every hash of the tree over ``rows``, of which there is one or more."""
    made = [tuple(hashlib.sha256(_LEAF + row).digest() for row in rows)]
    while len(made[-1]) > 1:
        below = made[-1]
        paired = [
            hashlib.sha256(_NODE + below[at] + below[at + 1]).digest()
            for at in range(0, len(below) - 1, 2)
        ]
        made.append((*paired, *below[2 * len(paired) :]))
    return tuple(made)


def paths(tree: Levels) -> tuple[bytes, ...]:
    """What leads from each row to the root: its siblings from the leaf up, 32 bytes each.

    All at once, from the root down: what is above two rows of one parent is the same.
    """
    above = [b""]
    for level in reversed(tree[:-1]):
        above = [
            (level[at ^ 1] if at ^ 1 < len(level) else b"") + above[at // 2]
            for at in range(len(level))
        ]
    return tuple(above)


def root_from(row: bytes, index: int, count: int, siblings: bytes) -> bytes | None:
    """The root that a row and its path lead to; None where the path has another length.

    Args:
        row: the row.
        index: its place among the rows, from 0.
        count: how many rows there are.
        siblings: what ``paths`` gave for it.
    """
    if not 0 <= index < count:
        return None
    reached, at = hashlib.sha256(_LEAF + row).digest(), 0
    while count > 1:
        if index ^ 1 < count:
            sibling = siblings[at : at + _HASH]
            at += _HASH
            both = sibling + reached if index % 2 else reached + sibling
            reached = hashlib.sha256(_NODE + both).digest()
        index, count = index // 2, (count + 1) // 2
    return reached if at == len(siblings) else None
