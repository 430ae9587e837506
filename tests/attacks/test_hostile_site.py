"""A hospital that lies, as dealer, as holder or in another's name: each is blamed rightly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloister_fl.errors import (
    BoxTampered,
    DealerBlamed,
    KeyReused,
    LowOrderKey,
    OverlapRefused,
    RosterMismatch,
    ShareMismatch,
    SignatureInvalid,
    StageRepeated,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.secagg import share_keys
from cloister_fl.secagg.crypto import shamir
from cloister_fl.secagg.messages.codec import Dealing, Shares
from cloister_fl.secagg.server import ServerEpoch
from support.errors import raises
from support.secagg import Federation, identity_of, over

FIRST, SECOND, THIRD, FOURTH, LAST = (f"site-{number:02d}" for number in range(1, 6))


def resigned(shares: Shares, keys: bytes, **changes: Any) -> Shares:
    """The shares as a dealer would send them that signs what it likes."""
    body = Dealing(shares.dealing.dealer, changes.pop("dealt", shares.dealing.dealt))
    signed = body.signed_by(identity_of(body.dealer), keys)
    return replace(shares, dealing=signed, **changes)


def test_wrong_share_as_holder() -> None:
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    request = over(server.unmask_request())
    honest = federation.sites[FIRST].unmask(request)
    dealer, share = honest.b_shares[1]
    wrong = (int.from_bytes(share, "big") ^ 1).to_bytes(33, "big")
    lie = replace(
        honest, b_shares=(honest.b_shares[0], (dealer, wrong), *honest.b_shares[2:])
    ).signed_by(identity_of(FIRST))
    with raises(ShareMismatch) as caught:
        server.receive_unmasked(over(lie))
    assert caught.value.blamed == FIRST
    # The others suffice; the liar costs nobody the round.
    for name in federation.names[1:]:
        server.receive_unmasked(federation.note(federation.sites[name].unmask(request)))
    assert (server.finish().total == federation.true_total(federation.names)).all()


def test_shares_of_other_sites_as_holder() -> None:
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    honest = federation.sites[FIRST].unmask(over(server.unmask_request()))
    lie = replace(honest, b_shares=honest.b_shares[:-1]).signed_by(identity_of(FIRST))
    with raises(ShareMismatch) as caught:
        server.receive_unmasked(over(lie))
    assert caught.value.blamed == FIRST


def dealt_wrong(monkeypatch: pytest.MonkeyPatch, which: int) -> tuple[Federation, ServerEpoch]:
    """A federation in which the second site deals shares of another secret than its own."""
    federation = Federation(5)
    right = share_keys.deal

    def wrong(dealer: str, identity: Identity, **rest: Any) -> Any:
        if dealer == SECOND:
            secrets = list(rest["secrets"])
            secrets[which] = bytes(32)
            rest["secrets"] = tuple(secrets)
        return right(dealer, identity, **rest)

    monkeypatch.setattr("cloister_fl.secagg.participant_epoch.deal", wrong)
    return federation, federation.prepared()


def test_wrong_secret_as_dealer(monkeypatch: pytest.MonkeyPatch) -> None:
    federation, server = dealt_wrong(monkeypatch, 0)
    federation.mask(server, federation.session())
    federation.consent(server)
    federation.unmask(server)
    with raises(DealerBlamed) as caught:
        server.finish()
    assert caught.value.blamed == SECOND


def test_wrong_mask_key_as_dealer(monkeypatch: pytest.MonkeyPatch) -> None:
    federation, server = dealt_wrong(monkeypatch, 1)
    federation.mask(server, federation.session(), absent=[SECOND])
    federation.consent(server)
    federation.unmask(server)
    with raises(DealerBlamed) as caught:
        server.finish()
    assert caught.value.blamed == SECOND


def test_shares_that_are_no_field_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares at or above p, each signed as it stands, are the dealer's doing."""
    right = shamir.split

    def wrong(secret: bytes, **rest: Any) -> tuple[bytes, ...]:
        shares = right(secret, **rest)
        return tuple(shamir.PRIME.to_bytes(33, "big") for _ in shares) if spoil else shares

    spoil = False
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    monkeypatch.setattr(shamir, "split", wrong)
    request = over(server.share_request())
    for name in federation.names:
        spoil = name == SECOND
        server.receive_shares(federation.note(federation.sites[name].share(request)))
    federation.mask(server, federation.session())
    federation.consent(server)
    federation.unmask(server)
    with raises(DealerBlamed) as caught:
        server.finish()
    assert caught.value.blamed == SECOND


def test_dealing_for_other_sites_as_dealer() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    shares = federation.sites[SECOND].share(over(server.share_request()))
    short = resigned(shares, server._keys, dealt=shares.dealing.dealt[:-1])
    with raises(DealerBlamed) as caught:
        server.receive_shares(over(short))
    assert caught.value.blamed == SECOND


def test_boxes_other_than_signed() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    shares = federation.sites[SECOND].share(over(server.share_request()))
    (one, box), (two, other) = shares.boxes[:2]
    with raises(BoxTampered):
        server.receive_shares(
            over(replace(shares, boxes=((one, other), (two, box), *shares.boxes[2:])))
        )
    with raises(BoxTampered):
        server.receive_shares(over(replace(shares, boxes=shares.boxes[1:])))


def test_stage_four_reply_forged_by_another_hospital() -> None:
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    request = over(server.unmask_request())
    own = federation.sites[SECOND].unmask(request)
    forged = replace(own, site=FIRST).signed_by(identity_of(SECOND))
    with raises(SignatureInvalid):
        server.receive_unmasked(over(forged))
    for name in federation.names:
        server.receive_unmasked(federation.note(federation.sites[name].unmask(request)))
    assert (server.finish().total == federation.true_total(federation.names)).all()


def test_vector_forged_by_another_hospital() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    before = server._total.copy()
    request = over(server.mask_request(FIRST))
    federation.sites[FIRST].open(request, session)
    masked = federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    spoilt = replace(masked, vector=bytes(len(masked.vector)))
    with raises(SignatureInvalid):
        server.receive_masked(over(spoilt))
    assert (server._total == before).all()
    server.receive_masked(over(masked))


def test_consent_forged_by_another_hospital() -> None:
    federation = Federation(5)
    server = federation.masked(absent=[LAST])
    request = server.close_vectors()
    assert request is not None
    own = federation.sites[SECOND].consent(over(request))
    with raises(SignatureInvalid):
        server.receive_consistent(over(replace(own, site=FIRST)))


def test_record_forged_by_another_hospital() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    request = over(server.advertise_request())
    own = federation.sites[SECOND].advertise(request)
    with raises(SignatureInvalid):
        server.receive_advertisement(over(replace(own, site=FIRST).signed_by(identity_of(SECOND))))
    with pytest.raises(RosterMismatch):
        server.receive_advertisement(over(replace(own, site="zz-unknown")))


def test_a_second_record() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    record = federation.sites[SECOND].advertise(over(server.advertise_request()))
    server.receive_advertisement(over(record))
    server.receive_advertisement(over(record))
    other = replace(record, commitment=bytes(32)).signed_by(identity_of(SECOND))
    with raises(StageRepeated) as caught:
        server.receive_advertisement(over(other))
    assert caught.value.blamed == SECOND


def test_another_sites_key_and_a_low_order_key() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    request = over(server.advertise_request())
    first = federation.sites[FIRST].advertise(request)
    server.receive_advertisement(over(first))
    second = federation.sites[SECOND].advertise(request)
    copied = replace(second, mask_pk=first.mask_pk).signed_by(identity_of(SECOND))
    with raises(KeyReused) as caught:
        server.receive_advertisement(over(copied))
    # Which of the two copied the other's, nobody can tell: neither takes part.
    assert caught.value.blamed_sites == (FIRST, SECOND)
    assert server._records == {}
    low = replace(second, enc_pk=bytes(32)).signed_by(identity_of(SECOND))
    with raises(LowOrderKey) as blamed:
        server.receive_advertisement(over(low))
    assert blamed.value.blamed == SECOND


def test_a_dropped_site_comes_back_at_stage_four() -> None:
    federation = Federation(5)
    server = federation.masked(absent=[LAST])
    federation.consent(server)
    reply = federation.sites[FIRST].unmask(over(server.unmask_request()))
    late = replace(reply, site=LAST).signed_by(identity_of(LAST))
    with raises(OverlapRefused):
        server.receive_unmasked(over(late))
