"""Whole rounds, with sites failing at every stage."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cloister_fl.errors import (
    OverlapRefused,
    SecureAggregationError,
    SessionMismatch,
    SessionUnknown,
    SiteAborted,
    StageOutOfOrder,
    StageRepeated,
    TooFewSurvivors,
    WireInvalid,
)
from cloister_fl.secagg.crypto import hashes
from cloister_fl.secagg.messages.codec import Abort, Bundle, Masked, MaskRequest, decode
from cloister_fl.secagg.server import ServerEpoch
from support.errors import is_of, raises
from support.secagg import Federation, identity_of, over

SIZES = [(3, 0), (4, 1), (5, 1), (7, 1), (10, 1)]


@pytest.mark.parametrize(("n", "c"), SIZES)
def test_sum_is_exact(n: int, c: int) -> None:
    federation = Federation(n, colluders=c)
    aggregate = federation.run()
    assert aggregate.survivors == federation.names
    assert np.array_equal(aggregate.total, federation.true_total(federation.names))
    assert aggregate.weight == n


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize(("n", "t"), [(5, 4), (7, 5), (10, 7)])
@pytest.mark.parametrize("from_front", [True, False])
def test_dropouts_that_can_be_borne(n: int, t: int, stage: int, from_front: bool) -> None:
    federation = Federation(n)
    assert federation.terms().parameters.t == t
    bearable = n - t
    gone = federation.names[:bearable] if from_front else federation.names[-bearable:]
    aggregate = federation.run(drop={stage: gone})
    # At stages 3 and 4 the vector is in already; at 3 the set is U2, so nothing is asked.
    expected = federation.names if stage >= 3 else tuple(sorted(set(federation.names) - set(gone)))
    assert aggregate.survivors == expected
    assert np.array_equal(aggregate.total, federation.true_total(expected))


@pytest.mark.parametrize("stage", [0, 1, 2, 4])
@pytest.mark.parametrize(("n", "t"), [(3, 3), (4, 4), (5, 4), (7, 5), (10, 7)])
def test_one_dropout_too_many(n: int, t: int, stage: int) -> None:
    federation = Federation(n, colluders=0 if n == 3 else 1)
    gone = federation.names[: n - t + 1]
    if n == 4 and stage == 4:
        gone = federation.names[:2]
    with pytest.raises(TooFewSurvivors):
        federation.run(drop={stage: gone})


@pytest.mark.parametrize("n", [7, 10])
def test_dropouts_spread_over_the_stages(n: int) -> None:
    federation = Federation(n)
    drop = {0: [federation.names[0]], 2: [federation.names[3]], 4: [federation.names[-1]]}
    if n == 7:
        del drop[4]
    aggregate = federation.run(drop=drop)
    assert np.array_equal(aggregate.total, federation.true_total(aggregate.survivors))


def test_too_few_consents_after_a_dropout() -> None:
    federation = Federation(5)
    server = federation.masked(absent=["site-05"])
    federation.consent(server, absent=["site-01"])
    with pytest.raises(TooFewSurvivors):
        server.unmask_request()


def test_retry_for_the_same_survivors() -> None:
    """Stage 4 failed: the next attempt, in a new epoch, is for the same U3 and succeeds."""
    federation = Federation(7)
    server = federation.masked(absent=["site-07"])
    federation.consent(server)
    federation.unmask(server, absent=["site-01", "site-02"])
    with pytest.raises(TooFewSurvivors):
        server.finish()
    again = federation.prepared(federation.terms(1))
    federation.mask(again, federation.session(attempt=1), only=server.survivors)
    federation.consent(again)
    federation.unmask(again)
    aggregate = again.finish()
    assert aggregate.survivors == federation.names[:-1]
    assert np.array_equal(aggregate.total, federation.true_total(federation.names[:-1]))


def test_retry_without_a_survivor_it_was_answered_for() -> None:
    federation = Federation(7)
    federation.run(drop={2: ["site-07"]})
    again = federation.prepared(federation.terms(1))
    federation.mask(
        again, federation.session(attempt=1), absent=["site-01"], only=federation.names[:-1]
    )
    with pytest.raises(TooFewSurvivors):
        again.close_vectors()


def test_retry_before_any_answer_may_lose_a_site() -> None:
    federation = Federation(7)
    federation.masked()
    again = federation.run(epoch=1, session=federation.session(attempt=1), drop={2: ["site-07"]})
    assert again.survivors == federation.names[:-1]


def test_restart_between_any_two_stages() -> None:
    """A crash loses the epoch and nothing else: the round goes on, or again in a new epoch."""
    for crash in range(1, 5):
        federation = Federation(5)
        server = ServerEpoch(federation.terms(), federation.roster)
        steps = [
            lambda f, s: f.advertise(s),
            lambda f, s: f.share(s),
            lambda f, s: f.mask(s, f.session()),
            lambda f, s: f.consent(s),
            lambda f, s: f.unmask(s),
        ]
        for number, step in enumerate(steps):
            if number == crash:
                federation.sites["site-03"].close()
                federation.sites["site-03"] = federation.make_site("site-03")
            try:
                step(federation, server)
            except SecureAggregationError as error:
                if not is_of(error, SessionUnknown):
                    raise
                break
        retried = federation.run(epoch=1, session=federation.session(attempt=1))
        assert np.array_equal(retried.total, federation.true_total(federation.names))


def test_two_round_trips() -> None:
    """From the second round on: y with the next keys, shares with the next boxes."""
    federation = Federation(5)
    current = federation.prepared()
    for number in range(3):
        session = federation.session(round_number=number)
        following = ServerEpoch(federation.terms(number + 1), federation.roster)
        trips = 0
        for name in current.start(session):
            request = over(Bundle((current.mask_request(name), following.advertise_request())))
            first, second = request.parts
            assert isinstance(first, MaskRequest)
            site = federation.sites[name]
            site.open(first, session)
            masked = site.mask(first.kid, federation.updates[name], saturate=False)
            reply = over(Bundle((masked, site.respond(second))))
            current.receive_masked(reply.parts[0])
            following.receive_advertisement(reply.parts[1])
        trips += 1
        assert current.close_vectors() is None
        for name in current.survivors:
            request = over(Bundle((current.unmask_request(), following.share_request())))
            reply = over(Bundle(tuple(federation.sites[name].respond(p) for p in request.parts)))
            current.receive_unmasked(reply.parts[0])
            following.receive_shares(reply.parts[1])
        trips += 1
        assert trips == 2
        aggregate = current.finish()
        assert np.array_equal(aggregate.total, federation.true_total(federation.names))
        current = following


def test_repeated_requests_get_the_same_bytes() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    site = federation.sites["site-01"]
    request = server.advertise_request()
    assert site.advertise(request).encode() == site.advertise(over(request)).encode()
    federation.advertise(server)
    shares = server.share_request()
    assert site.share(shares).encode() == site.share(over(shares)).encode()
    federation.share(server)
    federation.mask(server, federation.session())
    mask = over(server.mask_request("site-01"))
    site.open(mask, federation.session())
    server.close_vectors()
    unmask = server.unmask_request()
    assert site.unmask(unmask).encode() == site.unmask(over(unmask)).encode()


def test_repeated_replies_are_counted_once() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    for name in server.start(session):
        request = server.mask_request(name)
        federation.sites[name].open(request, session)
        masked = federation.sites[name].mask(request.kid, federation.updates[name], saturate=False)
        server.receive_masked(masked)
        server.receive_masked(over(masked))
    federation.consent(server)
    federation.unmask(server)
    federation.unmask(server)
    assert np.array_equal(server.finish().total, federation.true_total(federation.names))


def test_a_second_vector_of_one_site() -> None:
    """The server takes one vector a site: another, signed as well as the first, is refused."""
    federation = Federation(5)
    server = federation.masked()
    name = "site-01"
    masked = federation.sites[name].mask(server.terms.kid, federation.updates[name], saturate=False)
    vector = bytes(len(masked.vector))
    body = Masked.body(masked.sid, name, masked.u2_hash, hashes.vector_hash(vector))
    second = replace(masked, vector=vector, signature=identity_of(name).sign(hashes.MASKED, *body))
    with raises(StageRepeated) as caught:
        server.receive_masked(over(second))
    assert caught.value.blamed == name


def test_stages_out_of_order() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    for early in (server.close_vectors, server.unmask_request, server.finish):
        with raises(StageOutOfOrder):
            early()
    with raises(StageOutOfOrder):
        server.start(federation.session())
    server = federation.masked()
    with raises(StageOutOfOrder):
        server.share_request()
    with raises(SessionMismatch):
        federation.prepared(federation.terms(3)).start(
            federation.session(weights=federation.weights[:-1])
        )
    with raises(OverlapRefused):
        server.mask_request("zz-unknown")


def test_aborts() -> None:
    federation = Federation(5)
    server = federation.masked(absent=["site-05"])
    site = federation.sites["site-05"]
    abort = over(site.abort(server.terms.kid, ValueError("words of a library")))
    assert isinstance(abort, Abort)
    assert abort.code == SiteAborted.code
    server.receive_abort(abort)
    assert server.aborted == {"site-05": abort}
    odd = Abort(abort.kid, "site-05", "CLO-999", "").signed_by(
        federation.sites["site-05"]._identity
    )
    with pytest.raises(WireInvalid):
        server.receive_abort(odd)
    federation.consent(server)
    federation.unmask(server)
    assert np.array_equal(server.finish().total, federation.true_total(federation.names[:-1]))


def test_respond_turns_refusals_into_aborts() -> None:
    federation = Federation(5)
    server = federation.masked(absent=["site-05"])
    request = server.close_vectors()
    assert request is not None
    bad = type(request)(request.sid, federation.names[1:4])
    answer = federation.sites["site-01"].respond(over(bad))
    assert isinstance(answer, Abort)
    assert (answer.code, answer.kid) == ("CLO-712", server.terms.kid)
    assert isinstance(decode(answer.encode()), Abort)


def test_secrets_are_erased() -> None:
    federation = Federation(5)
    federation.run()
    for site in federation.sites.values():
        for epoch in site._epochs.values():
            assert not any((epoch._b, epoch._mask_sk, epoch._enc_sk, epoch._held))


def test_server_memory_does_not_grow_with_the_sites() -> None:
    dimension = 200_000
    peaks = []
    for n in (5, 10):
        federation = Federation(n, dimension=dimension)
        server = federation.prepared()
        session = federation.session()
        names = server.start(session)
        vectors = []
        for name in names:
            request = server.mask_request(name)
            federation.sites[name].open(request, session)
            vectors.append(
                federation.sites[name].mask(request.kid, federation.updates[name], saturate=False)
            )
        tracemalloc.start()
        for masked in vectors:
            server.receive_masked(masked)
        federation.consent(server)
        federation.unmask(server)
        server.finish().mean()
        peaks.append(tracemalloc.get_traced_memory()[1] / (4 * dimension))
        tracemalloc.stop()
    assert max(peaks) < 3
    assert peaks[1] < peaks[0] + 0.5
