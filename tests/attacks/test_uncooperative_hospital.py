"""A hospital that leaves out what it was asked for, or accuses others: it is named, they stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cloister_fl.errors import TooFewSites, TooFewSurvivors
from cloister_fl.protocol.round_messages import Refused
from cloister_fl.secagg.messages.codec import (
    Abort,
    Advertisement,
    Complaint,
    Consistent,
    Disclosure,
    Masked,
    MaskRequest,
    Message,
    Shares,
    Unmasked,
    UnmaskRequest,
)
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.sum_record import SumRecord
from cloister_fl.server.rounds.collector import RoundLost
from cloister_fl.server.rounds.messenger import SILENT
from cloister_fl.server.rounds.run import Run
from support.errors import raises
from support.secagg import Federation, identity_of, over
from support.secagg_collector import DIMENSION, Collection

FIRST, SECOND, THIRD, FOURTH, LAST = (f"site-{number:02d}" for number in range(1, 6))
PROTOCOL = Refused.PROTOCOL.value

Parts = list[Message]
Asked = tuple[Message, ...]


def _without(kind: type[Message]) -> Callable[[str, Parts, Asked], Parts]:
    """The first site answers everything but what is of this kind."""

    def lie(name: str, parts: Parts, asked: Asked) -> Parts:
        return parts if name != FIRST else [part for part in parts if not isinstance(part, kind)]

    return lie


@pytest.mark.parametrize("kind", [Masked, Shares])
def test_a_hospital_that_leaves_its_part_out_is_named(kind: type[Message]) -> None:
    """It answers each message, and the next epoch's keys with it; it was missing and unnamed."""
    collection = Collection(5, _without(kind))
    collected = collection.round(1)
    assert collected.sites == (SECOND, THIRD, FOURTH, LAST)
    assert collected.mean == pytest.approx(collection.mean(collected.sites))
    assert collected.refused == {FIRST: PROTOCOL}


def test_a_hospital_that_leaves_its_shares_of_the_sum_out_is_named() -> None:
    """Beside one honest dropout, that is one share too few; the round failed, and unnamed."""

    def lie(name: str, parts: Parts, asked: Asked) -> Parts | None:
        if name == LAST and any(isinstance(part, MaskRequest) for part in asked):
            return None
        return _without(Unmasked)(name, parts, asked)

    collection = Collection(5, lie)
    with raises(TooFewSurvivors, match=f"{FIRST}: a check of secure aggregation failed"):
        collection.round(1)


def test_one_of_four_that_leaves_its_vector_out_is_named() -> None:
    collection = Collection(4, _without(Masked))
    with raises(TooFewSites, match=f"{FIRST}: a check of secure aggregation failed"):
        collection.round(1)


def test_a_round_that_is_lost_after_waiting_names_the_hospital_that_was_missing() -> None:
    """It says yes when it is asked again, so the reason given meanwhile was none."""
    collection = Collection(4, _without(Masked))
    participants = SimpleNamespace(again=lambda *given: None, refused={})
    run: Any = SimpleNamespace(
        _hooks=SimpleNamespace(patience=object()), _participants=participants
    )
    state: Any = SimpleNamespace(model=np.zeros(DIMENSION, np.float32), run="run-1", invited=())
    with pytest.raises(RoundLost) as lost:
        Run._collect(run, collection.collector, 1, state)
    assert lost.value.refused == {FIRST: PROTOCOL}


def test_an_excluded_hospital_is_named_in_each_later_sum() -> None:
    """It was named in the sum that found it out; those after it failed for want of a site."""

    def lie(name: str, parts: Parts, asked: Asked) -> Parts:
        if name != FIRST or not isinstance(parts[0], Advertisement):
            return parts
        return [replace(parts[0], enc_pk=bytes(32)).signed_by(identity_of(FIRST))]

    collection = Collection(4, lie)
    for number in (1, 2):
        with raises(TooFewSites, match=f"{FIRST}: a check of secure aggregation failed"):
            collection.round(number)


def test_an_answer_to_the_next_epoch_does_not_excuse_a_vector_that_did_not_come() -> None:
    def lie(name: str, parts: Parts, asked: Asked) -> Parts:
        if name == FIRST and isinstance(parts[0], Masked):
            assert isinstance(asked[0], MaskRequest)
            own = Abort(asked[0].kid, FIRST, "CLO-715").signed_by(identity_of(FIRST))
            return [own, *parts[1:]]
        return parts

    collected = Collection(5, lie).round(1)
    assert collected.sites == (SECOND, THIRD, FOURTH, LAST)
    assert set(collected.refused) == {FIRST}


def test_a_hospital_that_withholds_its_consent_is_asked_for_it_and_named() -> None:
    """Of three sites all must consent: a vector without its consent failed each round, unnamed."""

    def lie(name: str, parts: Parts, asked: Asked) -> Parts:
        if name != FIRST:
            return parts
        return [
            replace(p, consent=b"") if isinstance(p, Masked) else p
            for p in parts
            if not (silent and isinstance(p, Consistent))
        ]

    silent = False
    assert Collection(3, lie, colluders=0).round(1).sites == (FIRST, SECOND, THIRD)
    silent = True
    with raises(TooFewSites, match=f"{FIRST}: a check of secure aggregation failed"):
        Collection(3, lie, colluders=0).round(1)


def test_a_record_has_the_consent_that_was_withheld_at_first() -> None:
    """Else the run's sum, which stands, would not be found again in what is kept of it."""
    federation = Federation(3, colluders=0)
    server = ServerEpoch(federation.terms(), federation.roster, keep=True)
    federation.advertise(server)
    federation.share(server)
    session = federation.session()
    for name in server.start(session):
        request = over(server.mask_request(name))
        federation.sites[name].open(request, session)
        masked = federation.sites[name].mask(request.kid, federation.updates[name], saturate=False)
        server.receive_masked(
            over(replace(masked, consent=b"" if name == FIRST else masked.consent))
        )
    federation.consent(server)
    federation.unmask(server)
    total = server.finish().total
    record = SumRecord.decode(SumRecord.of(server, session).encode())
    assert [m.site for m in record.messages if isinstance(m, Consistent)] == [FIRST]
    assert (record.replay(federation.roster, session).total == total).all()


class Accuser:
    """The first site complains of ``dealer`` without a ground, and again or not once it has its
    shares."""

    def __init__(self, dealer: str, *, again: bool = False) -> None:
        self.collection: Collection | None = None
        self._dealer = dealer
        self._again = again
        self._kept: dict[bytes, Complaint] = {}

    def __call__(self, name: str, parts: Parts, asked: Asked) -> Parts:
        request = asked[0]
        if name != FIRST or not isinstance(request, MaskRequest) or self._dealer not in request.u2:
            return parts
        if request.kid not in self._kept:
            assert self.collection is not None
            keys = self.collection.sites[FIRST]._epochs[request.kid]._keys
            lied = Complaint(request.kid, keys, FIRST, (self._dealer,))
            self._kept[request.kid] = lied.signed_by(identity_of(FIRST))
        published = any(parcel.disclosed for parcel in request.parcels)
        return parts if published and not self._again else [self._kept[request.kid], *parts[1:]]


def test_an_accusation_and_a_lost_connection_do_not_exclude_a_hospital() -> None:
    """Who was a dropout of one round could not answer, and was shut out of the run."""
    accuses = Accuser(SECOND)

    def lie(name: str, parts: Parts, asked: Asked) -> Parts | None:
        away = number == 1 and name == SECOND and not isinstance(parts[0], Shares)
        seen.append(isinstance(asked[0], MaskRequest))
        return None if away and any(seen) else accuses(name, parts, asked)

    seen: list[bool] = []
    collection = accuses.collection = Collection(5, lie)
    number = 1
    collected = collection.round(1)
    assert collected.sites == (FIRST, THIRD, FOURTH, LAST)
    assert collected.refused == {SECOND: SILENT}
    number = 2
    collection.round(2)
    collected = collection.round(3)
    assert collected.sites == collection.names
    assert collected.refused == {}


def test_one_accusation_where_no_hospital_is_expected_to_collude() -> None:
    """With c = 0 the dealer refused to answer the one accuser, and was excluded on its word."""
    accuses = Accuser(SECOND)
    collection = accuses.collection = Collection(4, accuses, colluders=0)
    for number in (1, 2):
        collected = collection.round(number)
        assert collected.sites == collection.names
        assert collected.refused == {}


def test_the_one_accuser_s_share_joins_no_two_sets_of_answers() -> None:
    for n in range(3, 101):
        parameters = Parameters.derive(n, 0)
        assert parameters.accusers == 1
        assert 2 * parameters.t > n + 1
    assert Parameters.derive(10, 2).accusers == 2


def test_a_hospital_that_complains_of_shares_that_were_published_is_named() -> None:
    accuses = Accuser(SECOND, again=True)
    collection = accuses.collection = Collection(5, accuses)
    collected = collection.round(1)
    assert collected.sites == (SECOND, THIRD, FOURTH, LAST)
    assert collected.refused == {FIRST: PROTOCOL}


def test_a_silent_dealer_shuts_out_itself_and_not_whose_box_does_not_open() -> None:
    """Each round: it seals rubbish for one site, sends its vector, and publishes nothing."""
    accuses = Accuser(SECOND)

    def lie(name: str, parts: Parts, asked: Asked) -> Parts | None:
        if name == SECOND and isinstance(parts[0], Disclosure):
            return None
        return accuses(name, parts, asked)

    collection = accuses.collection = Collection(5, lie)
    for number in (1, 2, 3):
        collected = collection.round(number)
        assert collected.sites == (FIRST, THIRD, FOURTH, LAST)
    # Nobody is asked to open a sum that leaves the accuser out.
    asked = [part for _, part in collection.asked if isinstance(part, UnmaskRequest)]
    assert {part.u3 for part in asked} == {(FIRST, THIRD, FOURTH, LAST)}
