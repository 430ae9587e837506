"""Both machines under messages in any order, repeated, altered, cut short and misdirected.

Whatever arrives: no error without a number, no secret, no wrong sum.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cloister_fl.encoding.framing import frame, listed
from cloister_fl.errors import ParameterRefused, SecureAggregationError, WeightAboveCap, WireInvalid
from cloister_fl.secagg.messages.codec import (
    Abort,
    Advertisement,
    Bundle,
    Complaint,
    Consistent,
    Disclosure,
    DisclosureRequest,
    Masked,
    MaskRequest,
    Message,
    Shares,
    Unmasked,
    decode,
)
from cloister_fl.secagg.server import Phase, ServerEpoch
from support.secagg import Federation, identity_of, over

POOL = 60
UNREADABLE = {WireInvalid.code, ParameterRefused.code, WeightAboveCap.code}
"""Codes with which bytes that are no message are refused."""


class AnyOrder(RuleBasedStateMachine):
    """One server, five sites, and a network that does what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.federation = Federation(5, dimension=8)
        self.epoch = 0
        self.server = ServerEpoch(self.federation.terms(), self.federation.roster)
        self.session = self.federation.session()
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self.masked: set[tuple[str, bytes]] = set()

    @initialize(
        stages=st.integers(0, 5),
        absent=st.sets(st.integers(0, 4), max_size=1),
        times=st.integers(1, 2),
    )
    def begin(self, stages: int, absent: set[int], times: int) -> None:
        for _ in range(stages):
            self.honest_stage(absent, times)

    def _collected(self) -> list[Message]:
        """The requests of the server's phase; it stays in it."""
        server = self.server
        match server.phase:
            case Phase.KEYS:
                return [server.advertise_request()]
            case Phase.SHARES:
                return [server.share_request()]
            case Phase.VECTORS:
                return [server.mask_request(name) for name in server._u2]
            case Phase.CONSENTS:
                request = server.close_vectors()
                return [request] if request else []
            case Phase.UNMASKING:
                return [server.unmask_request()]
            case _:
                return []

    @rule()
    def advance(self) -> None:
        server = self.server
        with suppress(SecureAggregationError):
            match server.phase:
                case Phase.KEYS:
                    server.share_request()
                case Phase.SHARES:
                    server.start(self.session)
                case Phase.VECTORS:
                    server.close_vectors()
                case Phase.CONSENTS:
                    server.unmask_request()

    @rule()
    def ask(self) -> None:
        with suppress(SecureAggregationError):
            self.requests += self._collected()
        del self.requests[:-POOL]

    @rule(number=st.integers(0, 4), where=st.integers(0, POOL))
    def deliver_to_site(self, number: int, where: int) -> None:
        if self.requests:
            self._at_site(number, self.requests[where % len(self.requests)])

    def _at_site(self, number: int, request: Message) -> None:
        federation = self.federation
        name = federation.names[number]
        site = federation.sites[name]
        try:
            if isinstance(request, MaskRequest):
                site.open(request, self.session)
                # Asked again, the site is offered another update; it must not mask that one.
                again = (name, request.kid) in self.masked
                update = federation.updates[name] * np.float32(0 if again else 1)
                reply: Message = site.mask(request.kid, update, saturate=False)
                self.masked.add((name, request.kid))
            else:
                reply = site.respond(request)
        except SecureAggregationError as error:
            kid = request.kid if isinstance(request, MaskRequest) else bytes(32)
            reply = site.abort(kid, error)
        federation.look(name)
        self.replies.append(federation.note(reply))
        del self.replies[:-POOL]

    @rule(where=st.integers(0, POOL))
    def deliver_to_server(self, where: int) -> None:
        if self.replies:
            self._at_server(self.replies[where % len(self.replies)])

    def _at_server(self, reply: Message) -> None:
        receive: dict[type[Message], Any] = {
            Advertisement: self.server.receive_advertisement,
            Shares: self.server.receive_shares,
            Masked: self.server.receive_masked,
            Consistent: self.server.receive_consistent,
            Unmasked: self.server.receive_unmasked,
            Complaint: self.server.receive_complaint,
            Disclosure: self.server.receive_disclosure,
            Abort: self.server.receive_abort,
        }
        with suppress(SecureAggregationError):
            receive[type(reply)](reply)

    @rule(absent=st.sets(st.integers(0, 4), max_size=1), times=st.integers(1, 2))
    def honest_stage(self, absent: set[int], times: int) -> None:
        """Ask all, deliver to all but some, bring back all replies (twice, perhaps), go on."""
        batch = self._collected()
        for request in batch:
            names = self.federation.names
            if isinstance(request, MaskRequest):
                # Its own parcel is the one without a box.
                names = tuple(p.row.dealer for p in request.parcels if not p.box)
            for name in names:
                number = self.federation.names.index(name)
                for _ in range(0 if number in absent else times):
                    self._at_site(number, over(request))
                    self._at_server(self.replies[-1])
        self.requests += batch
        del self.requests[:-POOL]
        self.advance()
        self.finish()

    @rule(
        reply=st.booleans(),
        where=st.integers(0, POOL),
        place=st.integers(0, 10_000),
        how=st.integers(0, 3),
        number=st.integers(0, 4),
    )
    def spoil(self, reply: bool, where: int, place: int, how: int, number: int) -> None:
        pool = self.replies if reply else self.requests
        if not pool:
            return
        data = bytearray(pool[where % len(pool)].encode())
        place %= len(data)
        if how == 0:
            data[place] ^= 1 + place % 255
        elif how == 1:
            del data[place:]
        elif how == 2:
            data += data[place:]
        else:
            del data[place : place + 1]
        try:
            message = decode(bytes(data))
        except SecureAggregationError as error:
            if error.code not in UNREADABLE:
                raise
            return
        if isinstance(message, Advertisement | Shares | Masked | Consistent | Unmasked | Abort):
            self._at_server(message)
        elif not isinstance(message, Bundle):
            self._at_site(number, message)

    @rule(one=st.integers(0, POOL), other=st.integers(0, POOL), which=st.integers(0, 9))
    def cross(self, one: int, other: int, which: int) -> None:
        """Put a field of one message in the place of another's."""
        if not self.requests:
            return
        base = self.requests[one % len(self.requests)]
        donor = self.requests[other % len(self.requests)]
        mine = fields(base)  # type: ignore[arg-type]
        name = mine[which % len(mine)].name
        if hasattr(donor, name):
            crossed = replace(base, **{name: getattr(donor, name)})  # type: ignore[type-var]
            self._at_site(which % 5, crossed)

    @rule(number=st.integers(0, 4))
    def restart_site(self, number: int) -> None:
        name = self.federation.names[number]
        self.federation.sites[name].close()
        self.federation.sites[name] = self.federation.make_site(name)

    @rule()
    def next_epoch(self) -> None:
        self.epoch += 1
        self.server = ServerEpoch(self.federation.terms(self.epoch), self.federation.roster)
        self.session = self.federation.session(attempt=self.epoch)

    @rule()
    def finish(self) -> None:
        try:
            aggregate = self.server.finish()
        except SecureAggregationError:
            return
        expected = self.federation.true_total(aggregate.survivors)
        assert (aggregate.total == expected).all()
        assert len(aggregate.survivors) >= 4

    @invariant()
    def no_secret(self) -> None:
        sent = self.federation.sent
        for data in sent:
            assert not any(secret in data for secret in self.federation.secrets)
        answered: dict[tuple[bytes, str], tuple[str, ...]] = {}
        survivors: dict[str, set[tuple[str, ...]]] = {}
        for data in sent:
            reply = decode(data)
            if isinstance(reply, Unmasked):
                # One answer a session, and one U3 a round at any site.
                assert answered.setdefault((reply.sid, reply.site), reply.u3) == reply.u3
                survivors.setdefault(reply.site, set()).add(reply.u3)
                assert not set(dict(reply.b_shares)) & set(dict(reply.mask_key_shares))
                assert len(reply.u3) >= 4
        assert all(len(sets) == 1 for sets in survivors.values())
        vectors: dict[tuple[bytes, str], bytes] = {}
        for data in sent:
            reply = decode(data)
            if isinstance(reply, Masked):
                vector = bytes(reply.vector)
                assert vectors.setdefault((reply.sid, reply.site), vector) == vector


TestAnyOrder = pytest.mark.long(AnyOrder.TestCase)
TestAnyOrder.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _messages() -> list[bytes]:
    federation = Federation(5, seed=b"fuzz", dimension=4)
    server = federation.masked(absent=["site-05"])
    requests = [server.mask_request("site-01").encode()]
    federation.consent(server)
    federation.unmask(server)
    requests.append(server.unmask_request().encode())
    requests.append(ServerEpoch(federation.terms(), federation.roster).advertise_request().encode())
    complaint = Complaint(server.terms.kid, bytes(32), "site-01", ("site-02", "site-03"))
    signed = complaint.signed_by(identity_of("site-01"))
    shares = (("site-01", bytes(66)),)
    answer = Disclosure(server.terms.kid, "site-02", shares).signed_by(identity_of("site-02"))
    question = DisclosureRequest(server.terms.kid, (signed,))
    requests += [signed.encode(), answer.encode(), question.encode()]
    parts = (decode(federation.sent[0]), decode(federation.sent[-1]))
    return [*federation.sent, *requests, Bundle(parts).encode()]


MESSAGES = _messages()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_altered_bytes_are_refused_or_canonical(data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(MESSAGES))
    altered = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(altered) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "length"]))
        if kind == "flip" and altered:
            altered[place] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del altered[place:]
        elif kind == "insert":
            altered[place:place] = data.draw(st.binary(max_size=9))
        else:
            altered[place : place + 8] = (2**63).to_bytes(8, "big")
    try:
        message = decode(bytes(altered))
    except SecureAggregationError as error:
        if error.code not in UNREADABLE:
            raise
        return
    assert message.encode() == bytes(altered)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(WireInvalid):
        decode(data)


def test_trailing_and_missing_bytes() -> None:
    for data in MESSAGES:
        assert decode(data).encode() == data
        for cut in (1, 8, len(data) // 2):
            with pytest.raises(WireInvalid):
                decode(data[:-cut])
        with pytest.raises(WireInvalid):
            decode(data + b"\0")
        with pytest.raises(WireInvalid):
            decode(data.replace(b"secagg/v2", b"secagg/v1", 1))


def test_nested_bundles() -> None:
    """Refused at the second level, so no depth of nesting reaches the stack's end."""
    data = decode(MESSAGES[0]).encode()
    for depth in range(1, 200):
        data = frame(b"secagg/v2", b"bundle", listed([data]))
        if depth > 1:
            with pytest.raises(WireInvalid):
                decode(data)
