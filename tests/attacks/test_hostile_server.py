"""A server that lies to learn one hospital's update: every attack ends in a refusal."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloister_fl.errors import (
    KeyReused,
    LowOrderKey,
    OverlapRefused,
    OwnRecordAltered,
    ParameterRefused,
    RosterMismatch,
    SignatureInvalid,
    SplitView,
    StageRepeated,
    TooFewSurvivors,
)
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.secagg.crypto import hashes, key_agreement, keystream
from cloister_fl.secagg.messages.codec import (
    Advertisement,
    ConsistencyRequest,
    ShareRequest,
    UnmaskRequest,
)
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.secagg.server import ServerEpoch
from support.errors import raises
from support.secagg import Federation, identity_of, over

FIRST, SECOND, THIRD, FOURTH, LAST = (f"site-{number:02d}" for number in range(1, 6))


def fresh() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def swapped(request: ShareRequest, record: Advertisement) -> ShareRequest:
    records = tuple(record if old.site == record.site else old for old in request.records)
    return replace(request, records=records)


# Keys and roster


def test_key_substitution() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    mine = replace(request.records[1], enc_pk=fresh(), mask_pk=fresh())
    with raises(SignatureInvalid):
        federation.sites[FIRST].share(over(swapped(request, mine)))
    federation.assert_no_secret()


def test_key_substitution_signed_by_another_hospital() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    mine = replace(request.records[1], mask_pk=fresh()).signed_by(identity_of(THIRD))
    with raises(SignatureInvalid):
        federation.sites[FIRST].share(over(swapped(request, mine)))
    federation.assert_no_secret()


def test_own_record_altered() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    without = replace(request, records=request.records[1:])
    with raises(OwnRecordAltered):
        federation.sites[FIRST].share(over(without))
    federation.assert_no_secret()


# The last is a second encoding of the base point, 9: of full order, but not canonical.
@pytest.mark.parametrize("point", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18, 2**255 - 10])
def test_low_order_key(point: int) -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    bad = replace(request.records[1], mask_pk=point.to_bytes(32, "little"))
    # A hospital that helps the server signs it.
    bad = bad.signed_by(identity_of(SECOND))
    with raises(LowOrderKey) as caught:
        federation.sites[FIRST].share(over(swapped(request, bad)))
    assert caught.value.blamed == SECOND
    federation.assert_no_secret()


def test_one_key_for_two_sites() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    copy = replace(request.records[1], enc_pk=request.records[2].enc_pk)
    copy = copy.signed_by(identity_of(SECOND))
    with raises(KeyReused):
        federation.sites[FIRST].share(over(swapped(request, copy)))
    federation.assert_no_secret()


def test_sybil_roster() -> None:
    federation = Federation(5)
    sybils = [f"sybil-{number}" for number in range(3)]
    grown = Roster.of(
        "federation",
        2,
        [*federation.roster.entries, *(RosterEntry(s, identity_of(s).public) for s in sybils)],
    )
    # Signed by the root or not: it is not the one that the steward pinned.
    terms = federation.terms(roster=grown.digest, invited=(FIRST, LAST, *sybils))
    server = ServerEpoch(terms, grown)
    with pytest.raises(RosterMismatch):
        federation.sites[FIRST].advertise(over(server.advertise_request()))
    # Nor is it taken while its new sites wait to be invited.
    quiet = ServerEpoch(federation.terms(roster=grown.digest), grown)
    with pytest.raises(RosterMismatch):
        federation.sites[FIRST].advertise(over(quiet.advertise_request()))
    assert not federation.sent


def test_sybils_invited_past_the_pinned_roster() -> None:
    federation = Federation(5)
    terms = federation.terms(invited=(FIRST, SECOND, THIRD, "sybil-1", "sybil-2"))
    terms = replace(terms, invited=tuple(sorted(terms.invited)))
    server = ServerEpoch(terms, federation.roster)
    with pytest.raises(RosterMismatch):
        federation.sites[FIRST].advertise(over(server.advertise_request()))


def test_threshold_of_one() -> None:
    federation = Federation(5)
    request = ServerEpoch(federation.terms(), federation.roster).advertise_request()
    with raises(ParameterRefused):
        federation.sites[FIRST].advertise(over(replace(request, threshold=1)))
    with raises(ParameterRefused):
        federation.sites[FIRST].advertise(over(replace(request, survivors=2)))


def test_fewer_colluders_than_approved() -> None:
    federation = Federation(7)
    terms = federation.terms(colluders=0)
    with raises(ParameterRefused):
        federation.sites[FIRST].advertise(
            over(ServerEpoch(terms, federation.roster).advertise_request())
        )


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_sum_of_two(n: int) -> None:
    with raises(ParameterRefused):
        Parameters.derive(n, 0)


def test_a_small_federation_where_a_large_one_was_approved() -> None:
    federation = Federation(5)
    terms = federation.terms(invited=federation.names[:4])
    with raises(ParameterRefused):
        federation.sites[FIRST].advertise(
            over(ServerEpoch(terms, federation.roster).advertise_request())
        )


def test_another_study() -> None:
    federation = Federation(5)
    terms = federation.terms(study=hashlib.sha256(b"not approved").digest())
    with raises(ParameterRefused):
        federation.sites[FIRST].advertise(
            over(ServerEpoch(terms, federation.roster).advertise_request())
        )


# Survivors


def test_split_view_of_u3() -> None:
    """Some sites are asked for U3 = U2, others for U3 without one site."""
    federation = Federation(7)
    server = federation.masked()
    sid, everyone = server.sid, federation.names
    fewer = everyone[:-1]
    consents = {}
    for name in fewer[:4]:
        consents[name] = federation.note(
            federation.sites[name].consent(over(ConsistencyRequest(sid, fewer)))
        ).signature
    server.close_vectors()
    whole = server.unmask_request()
    part = UnmaskRequest(sid, fewer, tuple(sorted(consents.items())))
    with raises(SplitView):
        federation.sites[FIRST].unmask(over(part))
    federation.assert_no_secret()
    # Signatures over U2 do not stand for another set.
    moved = UnmaskRequest(sid, fewer, whole.signatures[:-1])
    with raises(SplitView):
        federation.sites[SECOND].unmask(over(moved))
    federation.assert_no_secret()


def test_active_and_dead_overlap() -> None:
    """A site is first a survivor, then a dropout: both its secrets are asked for."""
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    whole = over(server.unmask_request())
    fewer = federation.names[:-1]
    for name in fewer:
        federation.note(federation.sites[name].consent(ConsistencyRequest(server.sid, fewer)))
    consents = tuple(
        (name, federation.sites[name].consent(ConsistencyRequest(server.sid, fewer)).signature)
        for name in fewer
    )
    federation.note(federation.sites[FIRST].unmask(whole))
    with raises(StageRepeated):
        federation.sites[FIRST].unmask(over(UnmaskRequest(server.sid, fewer, consents)))
    federation.assert_no_secret(stage_four=True)
    reply = federation.released()[0]
    assert {dealer for dealer, _ in reply.b_shares}.isdisjoint(
        dealer for dealer, _ in reply.mask_key_shares
    )


def test_dropped_sites_are_the_sites_own_conclusion() -> None:
    federation = Federation(5)
    server = federation.masked(absent=[LAST])
    federation.consent(server)
    reply = federation.sites[FIRST].unmask(over(server.unmask_request()))
    assert tuple(dealer for dealer, _ in reply.b_shares) == federation.names[:-1]
    assert tuple(dealer for dealer, _ in reply.mask_key_shares) == (LAST,)


def test_unknown_site_in_u3() -> None:
    federation = Federation(5)
    server = federation.masked()
    with raises(OverlapRefused):
        federation.sites[FIRST].consent(
            over(ConsistencyRequest(server.sid, (*federation.names[:4], "zz-unknown")))
        )
    federation.assert_no_secret()


def test_u3_without_the_site_itself() -> None:
    federation = Federation(5)
    server = federation.masked()
    with raises(OverlapRefused):
        federation.sites[FIRST].consent(over(ConsistencyRequest(server.sid, federation.names[1:])))
    federation.assert_no_secret()


def test_u3_too_small() -> None:
    federation = Federation(7)
    server = federation.masked()
    with pytest.raises(TooFewSurvivors):
        federation.sites[FIRST].consent(over(ConsistencyRequest(server.sid, federation.names[:4])))
    federation.assert_no_secret()


def test_a_second_other_u3() -> None:
    federation = Federation(7)
    server = federation.masked()
    site = federation.sites[FIRST]
    site.consent(over(ConsistencyRequest(server.sid, federation.names[:6])))
    with raises(StageRepeated):
        site.consent(over(ConsistencyRequest(server.sid, federation.names[:5])))
    federation.assert_no_secret()


def test_one_signature_for_many() -> None:
    """The quorum must be of distinct members: a site's own consent does not count t times."""
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    request = server.unmask_request()
    with raises(SplitView):
        federation.sites[FIRST].unmask(over(replace(request, signatures=request.signatures[:3])))
    copied = tuple((name, request.signatures[0][1]) for name in federation.names)
    with raises(SplitView):
        federation.sites[SECOND].unmask(over(replace(request, signatures=copied)))
    federation.assert_no_secret()


# What the masks are made of


def test_seeds_of_few_bits() -> None:
    """The stock generator folds a seed to 32 bits: seeds that fold alike mask alike."""
    one = bytearray(range(32))
    other = bytes(one[4:8] + one[:4] + one[8:])
    streams = []
    for key in (bytes(one), other):
        stream = np.zeros(64, np.uint32)
        keystream.apply(stream, [(key, 1)])
        streams.append(stream)
    assert not np.array_equal(*streams)
    for place in range(32):
        changed = bytearray(one)
        changed[place] ^= 0x80
        stream = np.zeros(64, np.uint32)
        keystream.apply(stream, [(bytes(changed), 1)])
        assert not np.array_equal(stream, streams[0])


def test_views_that_differ_do_not_cancel() -> None:
    """Pair masks are keyed by session and U2, so no two different ones cancel."""
    shared, salt = bytes(32), bytes(range(32))
    pair = ("site-01", "site-02")
    u2 = [hashes.set_hash(names) for names in (("a", "b", "c"), ("a", "b"))]
    made = {
        key_agreement.pair_mask_key(shared, salt, pair, sid, u2_hash)
        for sid in (bytes(32), b"\1" * 32)
        for u2_hash in u2
    }
    assert len(made) == 4
    assert key_agreement.pair_mask_key(shared, salt, pair[::-1], bytes(32), u2[0]) in made
    assert (
        len({key_agreement.self_mask_key(shared, salt, bytes(32), u2_hash) for u2_hash in u2}) == 2
    )
