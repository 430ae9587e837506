"""A server that asks again: with another session, after the shares, or under other weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister_fl.errors import StageRepeated, UpdateReuse
from cloister_fl.secagg.crypto.hashes import model_hash
from cloister_fl.secagg.server import ServerEpoch
from support.errors import raises
from support.secagg import Federation, over

FIRST = "site-01"


def test_attempt_with_other_weights() -> None:
    """Two linear sums of one round's updates would tell the update whose weight changed."""
    federation = Federation(5)
    federation.run()
    # The greatest weight stays, and with it the scale.
    lighter = tuple(
        (name, 0.5 if name == "site-03" else weight) for name, weight in federation.weights
    )
    server = ServerEpoch(federation.terms(1), federation.roster)
    federation.advertise(server)
    federation.share(server)
    session = federation.session(attempt=1, weights=lighter)
    server.start(session)
    with raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    assert len(federation.released()) == 5


@pytest.mark.parametrize("change", [{"dimension": 100}, {"clip": 0.5}])
def test_attempt_with_another_encoding(change: dict[str, float]) -> None:
    federation = Federation(5)
    federation.run()
    server = ServerEpoch(federation.terms(1), federation.roster)
    federation.advertise(server)
    federation.share(server)
    session = federation.session(attempt=1, **change)
    server.start(session)
    with raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)


def test_repeated_request_against_another_model() -> None:
    """The very bytes of a request, replayed with another model beside them."""
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    received = federation.session(model=model_hash(b"what came with the replay"))
    with raises(StageRepeated):
        federation.sites[FIRST].open(request, received)
    federation.assert_no_secret()


def test_repeated_request_after_the_shares() -> None:
    """The sum is out; a site that opened again would charge and train for nothing."""
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    federation.consent(server)
    federation.unmask(server)
    with raises(StageRepeated):
        federation.sites[FIRST].open(request, federation.session())
    assert len(federation.released()) == 5


def test_repeated_request_in_time_changes_nothing() -> None:
    """A lost answer may be asked for again: the same bytes come back."""
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    first = federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    federation.sites[FIRST].open(request, federation.session())
    assert federation.sites[FIRST].has_masked(request.kid)
    other = replace(request)
    again = federation.sites[FIRST].mask(other.kid, -federation.updates[FIRST], saturate=False)
    assert again.encode() == first.encode()
