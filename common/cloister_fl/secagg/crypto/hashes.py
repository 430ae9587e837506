"""Hashes that bind messages to each other, each under its label (see ``framing``)."""

from __future__ import annotations

from collections.abc import Iterable

from cloister_fl.encoding.framing import Buffer, bulk_digest, digest, listed, names

ADVERTISE = "secagg/v1/sign/advertise"
SHARE = "secagg/v1/sign/share"
MASKED = "secagg/v1/sign/y"
CONSISTENT = "secagg/v1/sign/u3"
UNMASK = "secagg/v1/sign/unmask"
ABORT = "secagg/v1/sign/abort"

OF_B = "b"
OF_MASK_KEY = "mask_sk"


def keys_digest(kid: bytes, records: Iterable[bytes]) -> bytes:
    """T: the complete signed stage-0 records of U1, in order of site id; 32 bytes.

    It does not depend on the model, so keys and boxes can be sent ahead of it.
    """
    return digest("secagg/v1/T", kid, listed(records))


def commitment(kid: bytes, site: str, secret: bytes) -> bytes:
    """The commitment to b of stage 0; 32 bytes."""
    return digest("secagg/v1/b", kid, site.encode(), secret)


def set_hash(sites: Iterable[str]) -> bytes:
    """Hash of a set of sites, in rising order; 32 bytes."""
    return digest("secagg/v1/set", names(sites))


def share_hash(keys: bytes, kind: str, dealer: str, holder: str, share: bytes) -> bytes:
    """Hash of one share, which its dealer signs; 32 bytes."""
    return digest("secagg/v1/share", keys, kind.encode(), dealer.encode(), holder.encode(), share)


def box_hash(keys: bytes, dealer: str, holder: str, box: bytes) -> bytes:
    """Hash of one sealed box, which its dealer signs; 32 bytes."""
    return digest("secagg/v1/box", keys, dealer.encode(), holder.encode(), box)


def vector_hash(vector: Buffer) -> bytes:
    """Hash of a masked vector's bytes, by BLAKE3; 32 bytes."""
    return bulk_digest("secagg/v1/vector", vector)


def model_hash(model: Buffer) -> bytes:
    """Hash of the global model's bytes as they were received, by BLAKE3; 32 bytes."""
    return bulk_digest("secagg/v1/model", model)
