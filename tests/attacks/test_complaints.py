"""A dealer whose boxes do not open is named, or publishes its shares, and nobody is shut out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloister_fl.errors import (
    BoxTampered,
    DealerBlamed,
    OverlapRefused,
    SessionMismatch,
    SignatureInvalid,
    StageOutOfOrder,
    TooManyComplaints,
)
from cloister_fl.secagg.crypto import hashes
from cloister_fl.secagg.messages.codec import (
    Complaint,
    Dealing,
    Disclosure,
    DisclosureRequest,
    Shares,
)
from cloister_fl.secagg.server import ServerEpoch
from support.errors import raises
from support.secagg import Federation, identity_of, over

FIRST, SECOND, THIRD, FOURTH, LAST = (f"site-{number:02d}" for number in range(1, 6))


def _garbled(shares: Shares, keys: bytes) -> Shares:
    """A box that does not open, hashed and signed as it stands."""
    box = bytes(len(shares.boxes[0][1]))
    return _resigned(shares, keys, (FIRST, box), box_hash=hashes.box_hash(keys, SECOND, FIRST, box))


def _other_share(shares: Shares, keys: bytes) -> Shares:
    """A box with another share than the dealer signed."""
    return _resigned(shares, keys, shares.boxes[0], b_hash=bytes(32))


def _resigned(shares: Shares, keys: bytes, box: tuple[str, bytes], **changes: bytes) -> Shares:
    first, *rest = shares.dealing.dealt
    dealt = (replace(first, **changes), *rest)
    signed = Dealing(SECOND, dealt).signed_by(identity_of(SECOND), keys)
    return replace(shares, dealing=signed, boxes=(box, *shares.boxes[1:]))


def _dealt(spoil: Any) -> tuple[Federation, ServerEpoch]:
    """All have dealt, the second site to the first what ``spoil`` makes of it."""
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = over(server.share_request())
    for name in federation.names:
        shares = federation.sites[name].share(request)
        if name == SECOND:
            shares = spoil(shares, server._keys)
            # A dealer that lies knows its own lie.
            epoch = federation.sites[SECOND]._epochs[server.terms.kid]
            epoch._own_row = shares.dealing.row(SECOND)
        server.receive_shares(federation.note(shares))
    server.start(federation.session())
    return federation, server


def _complained(spoil: Any = _garbled) -> tuple[Federation, ServerEpoch]:
    """The first site has complained, and all others have sent their vectors."""
    federation, server = _dealt(spoil)
    for name in federation.names:
        request = over(server.mask_request(name))
        complaint = federation.sites[name].open(request, federation.session())
        if complaint is not None:
            assert (name, complaint.dealers) == (FIRST, (SECOND,))
            server.receive_complaint(federation.note(complaint))
        else:
            _send(federation, server, name)
    federation.assert_no_secret()
    return federation, server


def _send(federation: Federation, server: ServerEpoch, name: str) -> None:
    update = federation.updates[name]
    masked = federation.sites[name].mask(server.terms.kid, update, saturate=False)
    server.receive_masked(federation.note(masked))


def test_the_accuser_goes_on_with_the_shares_that_the_dealer_publishes() -> None:
    federation, server = _complained()
    (request,) = server.disclosure_requests().values()
    assert server.unanswered == (SECOND,)
    assert server.accusers == ()
    reply = federation.note(federation.sites[SECOND].disclose(over(request)))
    server.receive_disclosure(reply)
    server.receive_disclosure(reply)
    assert server.unanswered == ()
    assert server.accusers == (FIRST,)
    again = over(server.mask_request(FIRST))
    assert federation.sites[FIRST].open(again, federation.session()) is None
    _send(federation, server, FIRST)
    federation.consent(server)
    federation.unmask(server)
    aggregate = server.finish()
    assert aggregate.survivors == federation.names
    assert (aggregate.total == federation.true_total(federation.names)).all()
    federation.assert_no_secret(stage_four=True)


def test_a_silent_dealer_is_named_and_the_others_sums_stand() -> None:
    federation, server = _complained()
    assert set(server.disclosure_requests()) == {SECOND}
    assert server.unanswered == (SECOND,)
    assert server.accusers == ()
    federation.consent(server)
    federation.unmask(server)
    aggregate = server.finish()
    assert aggregate.survivors == federation.names[1:]
    assert (aggregate.total == federation.true_total(aggregate.survivors)).all()


@pytest.mark.parametrize("lie", ["other shares", "no shares"])
def test_a_dealer_that_publishes_other_shares_than_it_signed_is_named(lie: str) -> None:
    federation, server = _complained()
    request = over(server.disclosure_requests()[SECOND])
    honest = federation.sites[SECOND].disclose(request)
    shares = ((FIRST, bytes(66)),) if lie == "other shares" else ()
    wrong = Disclosure(honest.kid, SECOND, shares).signed_by(identity_of(SECOND))
    with raises(DealerBlamed) as caught:
        server.receive_disclosure(over(wrong))
    assert caught.value.blamed == SECOND
    assert server.unanswered == (SECOND,)


def test_a_dealer_that_signed_other_shares_than_it_dealt_cannot_publish_them() -> None:
    federation, server = _complained(_other_share)
    request = over(server.disclosure_requests()[SECOND])
    with raises(DealerBlamed) as caught:
        server.receive_disclosure(over(federation.sites[SECOND].disclose(request)))
    assert caught.value.blamed == SECOND


def test_a_disclosure_forged_by_another_hospital() -> None:
    federation, server = _complained()
    own = federation.sites[SECOND].disclose(over(server.disclosure_requests()[SECOND]))
    with raises(SignatureInvalid):
        server.receive_disclosure(over(own.signed_by(identity_of(THIRD))))
    server.receive_disclosure(over(own))


def test_a_box_that_the_server_spoilt_is_no_ground_for_a_complaint() -> None:
    federation, server = _dealt(lambda shares, keys: shares)
    request = server.mask_request(FIRST)
    parcel = replace(request.parcels[1], box=bytes(len(request.parcels[1].box)))
    spoilt = replace(request, parcels=(request.parcels[0], parcel, *request.parcels[2:]))
    with raises(BoxTampered):
        federation.sites[FIRST].open(over(spoilt), federation.session())
    federation.assert_no_secret()


def _of(server: ServerEpoch, accuser: str, signer: str = "", **changes: Any) -> Complaint:
    fields = {"kid": server.terms.kid, "keys": server._keys, "dealers": (SECOND,), **changes}
    return Complaint(site=accuser, **fields).signed_by(identity_of(signer or accuser))


def test_a_server_that_makes_up_complaints_gets_no_share() -> None:
    """With one share of t it would have one more; so it takes a signature of the accuser's own."""
    forged: tuple[tuple[Any, str, dict[str, Any]], ...] = (
        (SignatureInvalid, FIRST, {"signer": "root"}),
        (SignatureInvalid, "zz-unknown", {}),
        (SessionMismatch, FIRST, {"keys": bytes(32)}),
        (SessionMismatch, FIRST, {"kid": bytes(32)}),
        (SessionMismatch, FIRST, {"dealers": (THIRD,)}),
        (SessionMismatch, FIRST, {"dealers": ()}),
        (SessionMismatch, SECOND, {}),
    )
    for error, accuser, changes in forged:
        federation, server = _dealt(lambda shares, keys: shares)
        kid, complaint = server.terms.kid, _of(server, accuser, **changes)
        with raises(error):
            federation.sites[SECOND].disclose(over(DisclosureRequest(kid, (complaint,))))
        # What failed ends the epoch: its secrets are gone.
        assert not federation.sites[SECOND]._epochs[kid]._dealt


def test_more_complaints_than_sites_that_may_lie_get_no_share() -> None:
    federation, server = _dealt(lambda shares, keys: shares)
    kid, dealer = server.terms.kid, federation.sites[SECOND]
    one = dealer.disclose(over(DisclosureRequest(kid, (_of(server, FIRST),))))
    assert [site for site, _ in one.shares] == [FIRST]
    assert dealer.disclose(over(DisclosureRequest(kid, (_of(server, FIRST),)))) == one
    with raises(TooManyComplaints):
        dealer.disclose(over(DisclosureRequest(kid, (_of(server, THIRD),))))


def test_no_share_is_published_once_stage_four_was_answered() -> None:
    federation, server = _dealt(lambda shares, keys: shares)
    for name in federation.names:
        federation.sites[name].open(over(server.mask_request(name)), federation.session())
        _send(federation, server, name)
    request = DisclosureRequest(server.terms.kid, (_of(server, FIRST),))
    federation.consent(server)
    federation.unmask(server)
    with raises(StageOutOfOrder):
        federation.sites[SECOND].disclose(over(request))


def test_disclosed_shares_that_the_server_altered() -> None:
    federation, server = _complained()
    request = over(server.disclosure_requests()[SECOND])
    server.receive_disclosure(over(federation.sites[SECOND].disclose(request)))
    parcels = server.mask_request(FIRST).parcels
    altered = replace(
        server.mask_request(FIRST),
        parcels=(parcels[0], replace(parcels[1], disclosed=bytes(66)), *parcels[2:]),
    )
    with raises(BoxTampered):
        federation.sites[FIRST].open(over(altered), federation.session())
    federation.assert_no_secret()


def test_a_complaint_of_a_site_that_sent_its_vector_and_an_answer_that_nobody_asked_for() -> None:
    federation, server = _dealt(lambda shares, keys: shares)
    federation.sites[FIRST].open(over(server.mask_request(FIRST)), federation.session())
    _send(federation, server, FIRST)
    with raises(OverlapRefused):
        server.receive_complaint(over(_of(server, FIRST)))
    unasked = Disclosure(server.terms.kid, SECOND, ()).signed_by(identity_of(SECOND))
    with raises(OverlapRefused):
        server.receive_disclosure(over(unasked))


def test_an_accuser_that_lies_gets_its_own_shares_and_the_sum_stands() -> None:
    federation, server = _dealt(lambda shares, keys: shares)
    server.receive_complaint(over(_of(server, FIRST)))
    request = over(server.disclosure_requests()[SECOND])
    server.receive_disclosure(over(federation.sites[SECOND].disclose(request)))
    for name in federation.names:
        again = over(server.mask_request(name))
        assert federation.sites[name].open(again, federation.session()) is None
        _send(federation, server, name)
    federation.consent(server)
    federation.unmask(server)
    assert (server.finish().total == federation.true_total(federation.names)).all()
