"""What messages take: requests that grow with the sites, vectors that are copied once."""

from __future__ import annotations

import tracemalloc

import pytest

from cloister_fl.secagg.messages.codec import (
    Advertisement,
    Bundle,
    Dealing,
    DealtTo,
    Masked,
    MaskRequest,
    Parcel,
    decode,
)
from cloister_fl.secagg.messages.participant_messages import BOX_BYTES
from cloister_fl.secagg.session import Session

MEGABYTE = 1 << 20


def mask_request(n: int) -> MaskRequest:
    """A request to the last of n sites whose ids are as long as ids may be."""
    names = [f"{number:03d}-".ljust(63, "x") for number in range(n)]
    dealt = tuple(DealtTo(name, bytes(32), bytes(32), bytes(32)) for name in names)
    parcels = tuple(
        Parcel(Dealing(name, dealt, bytes(64)).row(names[-1]), bytes(BOX_BYTES)) for name in names
    )
    session = Session(1, 0, bytes(32), 1000, 1.0, tuple((name, 1.0) for name in names))
    return MaskRequest(bytes(32), session, parcels)


def test_a_request_to_one_of_a_hundred_sites_is_100000_bytes_at_most() -> None:
    size = len(mask_request(100).encode())
    assert size <= 100_000
    # Twice the sites are twice the bytes, and a path that is longer by one hash each.
    assert size < 2.2 * len(mask_request(50).encode())


def masked(vector: bytes | memoryview) -> Masked:
    return Masked(bytes(32), "site", bytes(32), vector, bytes(64), bytes(64))


def test_a_vector_is_copied_once_however_many_frames_are_around_it() -> None:
    vector = memoryview(bytes(8 * MEGABYTE))
    record = Advertisement(bytes(32), "site", *[bytes(32)] * 3, bytes(64))
    bundle = Bundle((masked(vector), record))
    tracemalloc.start()
    try:
        data = bundle.encode()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) > len(vector)
    assert peak < 1.1 * len(data)
    assert decode(data) == bundle


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_bundle_is_the_list_of_its_messages(count: int) -> None:
    parts = tuple(masked(bytes([number] * number)) for number in range(count))
    data = Bundle(parts).encode()
    assert decode(data) == Bundle(parts)
    for part in parts:
        assert part.encode() in data
