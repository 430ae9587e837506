"""A server that lies to learn one hospital's update: every attack ends in a refusal."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloister_common.errors import (
    BoxTampered,
    EpochReused,
    KeyReused,
    LowOrderKey,
    OverlapRefused,
    OwnRecordAltered,
    ParameterRefused,
    RosterMismatch,
    SessionMismatch,
    SessionUnknown,
    SignatureInvalid,
    SplitView,
    StageRepeated,
    TooFewSurvivors,
    UpdateReuse,
)
from cloister_common.roster import Roster, RosterEntry, require_pinned
from cloister_common.secagg import keys, masks, model_hash, wire
from cloister_common.secagg.messages import (
    Advertisement,
    ConsistencyRequest,
    Parcel,
    ShareRequest,
    UnmaskRequest,
)
from cloister_common.secagg.parameters import Parameters
from cloister_common.secagg.server import ServerEpoch
from secagg_kit import Federation, MemoryStore, identity_of, over

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
    with pytest.raises(SignatureInvalid):
        federation.sites[FIRST].share(over(swapped(request, mine)))
    federation.assert_no_secret()


def test_key_substitution_signed_by_another_hospital() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    mine = replace(request.records[1], mask_pk=fresh()).signed_by(identity_of(THIRD))
    with pytest.raises(SignatureInvalid):
        federation.sites[FIRST].share(over(swapped(request, mine)))
    federation.assert_no_secret()


def test_own_record_altered() -> None:
    federation = Federation(5)
    server = ServerEpoch(federation.terms(), federation.roster)
    federation.advertise(server)
    request = server.share_request()
    without = replace(request, records=request.records[1:])
    with pytest.raises(OwnRecordAltered):
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
    with pytest.raises(LowOrderKey) as caught:
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
    with pytest.raises(KeyReused):
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
    with pytest.raises(RosterMismatch):
        require_pinned(federation.roster.digest, grown)
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
    with pytest.raises(ParameterRefused):
        federation.sites[FIRST].advertise(over(replace(request, threshold=1)))
    with pytest.raises(ParameterRefused):
        federation.sites[FIRST].advertise(over(replace(request, survivors=2)))


def test_fewer_colluders_than_approved() -> None:
    federation = Federation(7)
    terms = federation.terms(colluders=0)
    with pytest.raises(ParameterRefused):
        federation.sites[FIRST].advertise(
            over(ServerEpoch(terms, federation.roster).advertise_request())
        )


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_sum_of_two(n: int) -> None:
    with pytest.raises(ParameterRefused):
        Parameters.derive(n, 0)


def test_a_small_federation_where_a_large_one_was_approved() -> None:
    federation = Federation(5)
    terms = federation.terms(invited=federation.names[:4])
    with pytest.raises(ParameterRefused):
        federation.sites[FIRST].advertise(
            over(ServerEpoch(terms, federation.roster).advertise_request())
        )


def test_another_study() -> None:
    federation = Federation(5)
    terms = federation.terms(study=hashlib.sha256(b"not approved").digest())
    with pytest.raises(ParameterRefused):
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
    with pytest.raises(SplitView):
        federation.sites[FIRST].unmask(over(part))
    federation.assert_no_secret()
    # Signatures over U2 do not stand for another set.
    moved = UnmaskRequest(sid, fewer, whole.signatures[:-1])
    with pytest.raises(SplitView):
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
    with pytest.raises(StageRepeated):
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
    with pytest.raises(OverlapRefused):
        federation.sites[FIRST].consent(
            over(ConsistencyRequest(server.sid, (*federation.names[:4], "zz-unknown")))
        )
    federation.assert_no_secret()


def test_u3_without_the_site_itself() -> None:
    federation = Federation(5)
    server = federation.masked()
    with pytest.raises(OverlapRefused):
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
    with pytest.raises(StageRepeated):
        site.consent(over(ConsistencyRequest(server.sid, federation.names[:5])))
    federation.assert_no_secret()


def test_one_signature_for_many() -> None:
    """The quorum must be of distinct members: a site's own consent does not count t times."""
    federation = Federation(5)
    server = federation.masked()
    server.close_vectors()
    request = server.unmask_request()
    with pytest.raises(SplitView):
        federation.sites[FIRST].unmask(over(replace(request, signatures=request.signatures[:3])))
    copied = tuple((name, request.signatures[0][1]) for name in federation.names)
    with pytest.raises(SplitView):
        federation.sites[SECOND].unmask(over(replace(request, signatures=copied)))
    federation.assert_no_secret()


# Sessions


def test_keys_sent_ahead_used_in_two_sessions() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    other = federation.session(round_number=1)
    with pytest.raises(StageRepeated):
        federation.sites[FIRST].open(replace(request, session=other), other)
    federation.assert_no_secret()


def test_second_stage_two_with_another_u2() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    fewer = replace(request, parcels=request.parcels[:-1])
    with pytest.raises(StageRepeated):
        federation.sites[FIRST].open(fewer, federation.session())
    # Nor does the site mask again: the epoch is over.
    with pytest.raises(SessionUnknown):
        federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    federation.assert_no_secret()


def test_second_stage_two_with_another_model() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    other = federation.session(model=model_hash(b"another model"))
    with pytest.raises(StageRepeated):
        federation.sites[FIRST].open(replace(request, session=other), other)
    federation.assert_no_secret()


def test_a_second_update_under_the_same_mask() -> None:
    """Two vectors under one mask differ by the two updates' difference."""
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    site = federation.sites[FIRST]
    once = site.mask(request.kid, federation.updates[FIRST], saturate=False)
    again = site.mask(request.kid, federation.updates[FIRST] * 0, saturate=False)
    assert once.encode() == again.encode()


def test_site_directory_restored_from_a_snapshot_in_mid_session() -> None:
    federation = Federation(5)
    server = federation.prepared()
    disk = federation.stores[FIRST].snapshot()
    session = federation.session()
    federation.mask(server, session)
    # No secret was on that disk, so the restored site holds none.
    assert not any(secret in repr(disk).encode() for secret in federation.secrets)
    assert not any(secret.hex() in repr(disk) for secret in federation.secrets)
    federation.stores[FIRST] = disk
    restored = federation.make_site(FIRST)
    with pytest.raises(SessionUnknown):
        restored.open(over(server.mask_request(FIRST)), session)
    with pytest.raises(EpochReused):
        restored.advertise(over(server.advertise_request()))
    server.close_vectors()
    with pytest.raises(SessionUnknown):
        restored.unmask(over(server.unmask_request()))
    federation.assert_no_secret()


def test_site_directory_restored_from_before_the_epoch() -> None:
    """The store has forgotten the id; the site makes other keys, which fit no old box."""
    federation = Federation(5)
    disk = MemoryStore()
    server = federation.masked()
    federation.stores[FIRST] = disk
    restored = federation.make_site(FIRST)
    restored.advertise(over(server.advertise_request()))
    with pytest.raises(OwnRecordAltered):
        restored.share(ShareRequest(server.terms.kid, tuple(server._records.values())))
    federation.assert_no_secret()


def retry(federation: Federation, names: tuple[str, ...], **terms: object) -> ServerEpoch:
    """A further attempt at round 0 among the given sites, up to stage 2."""
    server = ServerEpoch(federation.terms(1, **terms), federation.roster)
    keep = federation.names
    federation.names = server.terms.invited
    absent = set(keep) - set(names)
    federation.advertise(server, absent)
    federation.share(server, absent)
    federation.names = keep
    return server


def test_retry_minus_one_site() -> None:
    federation = Federation(7)
    federation.run()
    server = retry(federation, federation.names[:-1])
    session = federation.session(attempt=1)
    server.start(session)
    with pytest.raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    federation.assert_no_secret(stage_four=True)


def test_retry_with_all_boxes_minus_one_survivor() -> None:
    """U2 is whole, but the server says that one site dropped out this time."""
    federation = Federation(7)
    federation.run()
    before = len(federation.released())
    server = retry(federation, federation.names)
    federation.mask(server, federation.session(attempt=1), absent=federation.names[-1:])
    request = server.close_vectors()
    assert request is not None
    with pytest.raises(UpdateReuse):
        federation.sites[FIRST].consent(over(request))
    assert len(federation.released()) == before


def test_two_sessions_at_once_answered_for_two_sets() -> None:
    """Both consents are there before either stage 4: the store decides."""
    federation = Federation(7)
    one = federation.prepared()
    federation.mask(one, federation.session())
    other = retry(federation, federation.names)
    federation.mask(other, federation.session(attempt=1), absent=federation.names[-1:])
    federation.consent(one)
    federation.consent(other)
    federation.note(federation.sites[FIRST].unmask(over(one.unmask_request())))
    with pytest.raises(UpdateReuse):
        federation.sites[FIRST].unmask(over(other.unmask_request()))
    federation.assert_no_secret(stage_four=True)


def test_resume_under_a_new_run_id_minus_one_site() -> None:
    federation = Federation(7)
    federation.run()
    fewer = federation.names[:-1]
    federation.policy = replace(federation.policy)
    sites = {name: federation.make_site(name) for name in federation.names}
    federation.sites = sites
    server = retry(federation, fewer, run="run-2", invited=fewer)
    session = federation.session(attempt=1, weights=federation.weights[:-1])
    server.start(session)
    with pytest.raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    federation.assert_no_secret(stage_four=True)


def test_attempt_with_other_invited_sites() -> None:
    """Before any stage 4: t would differ, and with it what two attempts can be split into."""
    federation = Federation(7)
    federation.masked()
    fewer = federation.names[:-1]
    server = retry(federation, fewer, invited=fewer)
    session = federation.session(attempt=1, weights=federation.weights[:-1])
    server.start(session)
    with pytest.raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    federation.assert_no_secret()


def test_another_model_to_one_site() -> None:
    """Model inconsistency: one site gets a model under which its update stands out."""
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    lie = federation.session(model=model_hash(b"a model for one"))
    federation.mask(server, session, absent=[FIRST])
    request = replace(server.mask_request(FIRST), session=lie)
    federation.sites[FIRST].open(over(request), lie)
    odd = federation.note(
        federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    )
    with pytest.raises(SessionMismatch):
        server.receive_masked(odd)
    # The server lies on: it lists the site among the survivors and asks both sides to unmask.
    consents = tuple(sorted({**server._consents, FIRST: odd.consent}.items()))
    for name, sid in ((FIRST, odd.sid), (SECOND, server.sid)):
        asked = UnmaskRequest(sid, federation.names, consents)
        if name == FIRST:
            with pytest.raises(SplitView):
                federation.sites[name].unmask(over(asked))
        else:
            federation.note(federation.sites[name].unmask(over(asked)))
    # The others' shares take its self mask off, but its pair masks were keyed by another sid.
    federation.assert_no_secret(stage_four=True)


def test_model_other_than_the_one_received() -> None:
    federation = Federation(5)
    server = federation.prepared()
    server.start(federation.session(model=model_hash(b"what the server says")))
    with pytest.raises(SessionMismatch):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), federation.session())
    federation.assert_no_secret()


def test_altered_boxes() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request = server.mask_request(FIRST)
    parcel = request.parcels[1]
    spoilt = Parcel(parcel.dealing, bytes([parcel.box[0] ^ 1]) + parcel.box[1:])
    bad = replace(request, parcels=(request.parcels[0], spoilt, *request.parcels[2:]))
    with pytest.raises(BoxTampered):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_reordered_boxes() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request = server.mask_request(FIRST)
    one, two = request.parcels[1], request.parcels[2]
    bad = replace(
        request,
        parcels=(
            request.parcels[0],
            Parcel(one.dealing, two.box),
            Parcel(two.dealing, one.box),
            *request.parcels[3:],
        ),
    )
    with pytest.raises(BoxTampered):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_box_for_another_site() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request, other = server.mask_request(FIRST), server.mask_request(THIRD)
    bad = replace(
        request,
        parcels=(
            request.parcels[0],
            Parcel(request.parcels[1].dealing, other.parcels[1].box),
            *request.parcels[2:],
        ),
    )
    with pytest.raises(BoxTampered):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_dropped_boxes_below_the_least_size() -> None:
    federation = Federation(7)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request = server.mask_request(FIRST)
    with pytest.raises(TooFewSurvivors):
        federation.sites[FIRST].open(over(replace(request, parcels=request.parcels[:4])), session)
    federation.assert_no_secret()


def test_boxes_withheld_from_one_site_unequal_u2() -> None:
    """One site masks over a smaller U2; the views differ and stage 4 finds it out."""
    federation = Federation(7)
    server = federation.prepared()
    session = federation.session()
    federation.mask(server, session, absent=[FIRST])
    request = server.mask_request(FIRST)
    fewer = replace(request, parcels=request.parcels[:-1])
    federation.sites[FIRST].open(over(fewer), session)
    odd = federation.note(
        federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    )
    with pytest.raises(SessionMismatch):
        server.receive_masked(odd)
    u3 = tuple(fewer.u2)
    consents = {FIRST: odd.consent}
    for name in u3[1:]:
        reply = federation.sites[name].consent(over(ConsistencyRequest(server.sid, u3)))
        consents[name] = federation.note(reply).signature
    asked = UnmaskRequest(server.sid, u3, tuple(sorted(consents.items())))
    with pytest.raises(SplitView):
        federation.sites[FIRST].unmask(over(asked))
    federation.assert_no_secret()


def test_a_dealing_of_another_epoch() -> None:
    federation = Federation(5)
    old = federation.prepared()
    old.start(federation.session())
    stale = old.mask_request(FIRST).parcels[1]
    server = retry(federation, federation.names)
    session = federation.session(attempt=1)
    server.start(session)
    request = server.mask_request(FIRST)
    bad = replace(request, parcels=(request.parcels[0], stale, *request.parcels[2:]))
    with pytest.raises(SignatureInvalid):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_an_epoch_id_a_second_time() -> None:
    federation = Federation(5)
    request = over(ServerEpoch(federation.terms(), federation.roster).advertise_request())
    federation.sites[FIRST].advertise(request)
    federation.look(FIRST)
    federation.sites[FIRST].close()
    with pytest.raises(EpochReused):
        federation.sites[FIRST].advertise(request)


# What the masks are made of


def test_seeds_of_few_bits() -> None:
    """The stock generator folds a seed to 32 bits: seeds that fold alike mask alike."""
    one = bytearray(range(32))
    other = bytes(one[4:8] + one[:4] + one[8:])
    streams = []
    for key in (bytes(one), other):
        stream = np.zeros(64, np.uint32)
        masks.apply(stream, [(key, 1)])
        streams.append(stream)
    assert not np.array_equal(*streams)
    for place in range(32):
        changed = bytearray(one)
        changed[place] ^= 0x80
        stream = np.zeros(64, np.uint32)
        masks.apply(stream, [(bytes(changed), 1)])
        assert not np.array_equal(stream, streams[0])


def test_views_that_differ_do_not_cancel() -> None:
    """Pair masks are keyed by session and U2, so no two different ones cancel."""
    shared, salt = bytes(32), bytes(range(32))
    pair = ("site-01", "site-02")
    u2 = [wire.set_hash(names) for names in (("a", "b", "c"), ("a", "b"))]
    made = {
        keys.pair_mask_key(shared, salt, pair, sid, u2_hash)
        for sid in (bytes(32), b"\1" * 32)
        for u2_hash in u2
    }
    assert len(made) == 4
    assert keys.pair_mask_key(shared, salt, pair[::-1], bytes(32), u2[0]) in made
    assert len({keys.self_mask_key(shared, salt, bytes(32), u2_hash) for u2_hash in u2}) == 2
