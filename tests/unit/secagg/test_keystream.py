from __future__ import annotations

import os

import numpy as np
import pytest

from cloister_fl.secagg.crypto import keystream
from support.secagg import Federation


@pytest.mark.parametrize(
    "size", [1, 3, 4, 5, keystream.CHUNK_WORDS - 1, 3 * keystream.CHUNK_WORDS + 7]
)
def test_added_and_taken_away_is_nothing(size: int) -> None:
    start = np.arange(size, dtype=np.uint32)
    accumulator = start.copy()
    keys = [os.urandom(32) for _ in range(3)]
    keystream.apply(accumulator, [(key, 1) for key in keys])
    assert not np.array_equal(accumulator, start)
    keystream.apply(accumulator, [(key, -1) for key in reversed(keys)])
    assert np.array_equal(accumulator, start)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("size", [1, 2 * keystream.CHUNK_WORDS, 5 * keystream.CHUNK_WORDS + 3])
def test_threads_change_no_byte(threads: int, size: int) -> None:
    made = [(os.urandom(32), 1), (os.urandom(32), -1)]
    one, many = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    keystream.apply(one, made)
    keystream.apply(many, made, threads=threads)
    assert np.array_equal(one, many)


def test_threads_in_a_whole_round() -> None:
    federation = Federation(5, dimension=3 * keystream.CHUNK_WORDS + 5)
    aggregate = federation.run(drop={2: ["site-02"]}, threads=2)
    assert np.array_equal(aggregate.total, federation.true_total(aggregate.survivors))


def test_masks_do_not_repeat() -> None:
    """Two sites with the same update, and one site in two epochs, send unlike vectors."""
    federation = Federation(5, dimension=1000)
    same = federation.updates["site-01"]
    federation.updates = dict.fromkeys(federation.names, same)
    seen = set()
    for epoch in range(2):
        server = federation.prepared(federation.terms(epoch))
        session = federation.session(round_number=epoch)
        for name in server.start(session):
            request = server.mask_request(name)
            federation.sites[name].open(request, session)
            masked = federation.sites[name].mask(request.kid, same, saturate=False)
            seen.add(bytes(masked.vector))
    assert len(seen) == 10
