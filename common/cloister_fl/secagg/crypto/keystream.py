"""Masks: AES-256-CTR keystreams, added to or taken from an accumulator modulo 2^32.

CTR mode of NIST SP 800-38A, section 6.5, from counter zero: a key makes one mask and is never
used again, so no nonce is needed. The keystream is read as little-endian uint32.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

BLOCK_WORDS = 4
CHUNK_WORDS = 1 << 15
"""Words of keystream made at a time: 128 KiB, so that keystream and accumulator stay in cache."""

_ZEROS = bytes(4 * CHUNK_WORDS)

Mask = tuple[bytes, int]
"""A key of 32 bytes and +1 or -1."""


def apply(accumulator: NDArray[np.uint32], masks: Sequence[Mask], *, threads: int = 1) -> None:
    """Add (+1) or take away (-1) each mask's keystream, in place.

    Args:
        accumulator: D contiguous words.
        masks: keys and signs; the result does not depend on their order.
        threads: cores to use. Each works on a range of the accumulator of its own, at the
            counter where that range starts, so the bytes are the same for any number.
    """
    blocks = -(-accumulator.size // BLOCK_WORDS)
    share = BLOCK_WORDS * max(1, -(-blocks // max(1, threads)))
    starts = range(0, accumulator.size, share)
    if len(starts) <= 1 or accumulator.size < 2 * CHUNK_WORDS:
        _apply_from(accumulator, 0, masks)
        return
    # OpenSSL and numpy's loops release the interpreter lock, so threads suffice.
    with ThreadPoolExecutor(max_workers=len(starts)) as pool:
        work = [
            pool.submit(_apply_from, accumulator[start : start + share], start, masks)
            for start in starts
        ]
        for done in work:
            done.result()


def _apply_from(accumulator: NDArray[np.uint32], first: int, masks: Sequence[Mask]) -> None:
    counter = (first // BLOCK_WORDS).to_bytes(16, "big")
    streams = [
        (
            Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor(),
            np.add if sign > 0 else np.subtract,
        )
        for key, sign in masks
    ]
    scratch = np.zeros(CHUNK_WORDS, "<u4")
    raw = scratch.data.cast("B")
    for start in range(0, accumulator.size, CHUNK_WORDS):
        piece = accumulator[start : start + CHUNK_WORDS]
        size = piece.size
        zeros = _ZEROS if size == CHUNK_WORDS else _ZEROS[: 4 * size]
        keystream, target = scratch[:size], raw[: 4 * size]
        for stream, combine in streams:
            stream.update_into(zeros, target)
            combine(piece, keystream, out=piece)
    scratch.fill(0)
