"""A server that lies about sessions, attempts, models and boxes: every attack ends in a refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister_fl.errors import (
    BoxTampered,
    EpochReused,
    OwnRecordAltered,
    SessionMismatch,
    SessionUnknown,
    SignatureInvalid,
    SplitView,
    StageRepeated,
    TooFewSurvivors,
    UpdateReuse,
    WeightAboveCap,
)
from cloister_fl.secagg import model_hash
from cloister_fl.secagg.messages.codec import (
    ConsistencyRequest,
    Parcel,
    ShareRequest,
    UnmaskRequest,
)
from cloister_fl.secagg.server import ServerEpoch
from support.errors import raises
from support.secagg import Federation, MemoryStore, over, site_names

FIRST, SECOND, THIRD, FOURTH, LAST = (f"site-{number:02d}" for number in range(1, 6))


def test_keys_sent_ahead_used_in_two_sessions() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    other = federation.session(round_number=1)
    with raises(StageRepeated):
        federation.sites[FIRST].open(replace(request, session=other), other)
    federation.assert_no_secret()


def test_second_stage_two_with_another_u2() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    fewer = replace(request, parcels=request.parcels[:-1])
    with raises(StageRepeated):
        federation.sites[FIRST].open(fewer, federation.session())
    # Nor does the site mask again: the epoch is over.
    with raises(SessionUnknown):
        federation.sites[FIRST].mask(request.kid, federation.updates[FIRST], saturate=False)
    federation.assert_no_secret()


def test_second_stage_two_with_another_model() -> None:
    federation = Federation(5)
    server = federation.masked()
    request = over(server.mask_request(FIRST))
    other = federation.session(model=model_hash(b"another model"))
    with raises(StageRepeated):
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
    with raises(SessionUnknown):
        restored.open(over(server.mask_request(FIRST)), session)
    with raises(EpochReused):
        restored.advertise(over(server.advertise_request()))
    server.close_vectors()
    with raises(SessionUnknown):
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
    with raises(OwnRecordAltered):
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
    with raises(UpdateReuse):
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
    with raises(UpdateReuse):
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
    with raises(UpdateReuse):
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
    with raises(UpdateReuse):
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
    with raises(UpdateReuse):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    federation.assert_no_secret()


def test_public_weights_that_leave_one_update_in_the_sum() -> None:
    """1000 for one site and 0.001 for the rest: the sum is that site's update."""
    weights = {FIRST: 1000.0, **dict.fromkeys(site_names(5)[1:], 0.001)}
    federation = Federation(5, weights=weights, max_weight_ratio=1.0)
    server, session = federation.prepared(), federation.session()
    server.start(session)
    with raises(WeightAboveCap) as caught:
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), session)
    assert "factor of 1e+06; this site allows 1" in str(caught.value)
    abort = federation.sites[FIRST].abort(server.terms.kid, caught.value)
    assert abort.code == "CLO-721"
    federation.assert_no_secret()
    even = Federation(5, weights=dict.fromkeys(site_names(5), 3.0), max_weight_ratio=1.0)
    assert even.run().survivors == even.names


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
    with raises(SessionMismatch):
        server.receive_masked(odd)
    # The server lies on: it lists the site among the survivors and asks both sides to unmask.
    consents = tuple(sorted({**server._consents, FIRST: odd.consent}.items()))
    for name, sid in ((FIRST, odd.sid), (SECOND, server.sid)):
        asked = UnmaskRequest(sid, federation.names, consents)
        if name == FIRST:
            with raises(SplitView):
                federation.sites[name].unmask(over(asked))
        else:
            federation.note(federation.sites[name].unmask(over(asked)))
    # The others' shares take its self mask off, but its pair masks were keyed by another sid.
    federation.assert_no_secret(stage_four=True)


def test_model_other_than_the_one_received() -> None:
    federation = Federation(5)
    server = federation.prepared()
    server.start(federation.session(model=model_hash(b"what the server says")))
    with raises(SessionMismatch):
        federation.sites[FIRST].open(over(server.mask_request(FIRST)), federation.session())
    federation.assert_no_secret()


def test_altered_boxes() -> None:
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request = server.mask_request(FIRST)
    parcel = request.parcels[1]
    spoilt = Parcel(parcel.row, bytes([parcel.box[0] ^ 1]) + parcel.box[1:])
    bad = replace(request, parcels=(request.parcels[0], spoilt, *request.parcels[2:]))
    with raises(BoxTampered):
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
            Parcel(one.row, two.box),
            Parcel(two.row, one.box),
            *request.parcels[3:],
        ),
    )
    with raises(BoxTampered):
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
            Parcel(request.parcels[1].row, other.parcels[1].box),
            *request.parcels[2:],
        ),
    )
    with raises(BoxTampered):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_a_row_for_another_site() -> None:
    """Signed by its dealer, as all rows are, and sent with that site's box."""
    federation = Federation(5)
    server = federation.prepared()
    session = federation.session()
    server.start(session)
    request, other = server.mask_request(FIRST), server.mask_request(THIRD)
    parcels = (request.parcels[0], other.parcels[1], *request.parcels[2:])
    with raises(BoxTampered, match="is for another site"):
        federation.sites[FIRST].open(over(replace(request, parcels=parcels)), session)
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
    with raises(SessionMismatch):
        server.receive_masked(odd)
    u3 = tuple(fewer.u2)
    consents = {FIRST: odd.consent}
    for name in u3[1:]:
        reply = federation.sites[name].consent(over(ConsistencyRequest(server.sid, u3)))
        consents[name] = federation.note(reply).signature
    asked = UnmaskRequest(server.sid, u3, tuple(sorted(consents.items())))
    with raises(SplitView):
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
    with raises(SignatureInvalid):
        federation.sites[FIRST].open(over(bad), session)
    federation.assert_no_secret()


def test_an_epoch_id_a_second_time() -> None:
    federation = Federation(5)
    request = over(ServerEpoch(federation.terms(), federation.roster).advertise_request())
    federation.sites[FIRST].advertise(request)
    federation.look(FIRST)
    federation.sites[FIRST].close()
    with raises(EpochReused):
        federation.sites[FIRST].advertise(request)
