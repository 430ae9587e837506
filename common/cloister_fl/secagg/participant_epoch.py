"""One key epoch at a site: its secrets, its five stages, each once and in order.

Secrets live in this object only, never on disk: a restart loses them and with them the epoch.
They are overwritten when the epoch ends, as far as Python lets a program do so.
"""

from __future__ import annotations

import enum
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from cloister_fl.encoding.framing import digest
from cloister_fl.errors import (
    OverlapRefused,
    SessionMismatch,
    SessionUnknown,
    SplitView,
    StageOutOfOrder,
    StageRepeated,
    TooFewSurvivors,
    TooManyComplaints,
    UpdateReuse,
)
from cloister_fl.membership.identity import Identity, verify
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg import peer_checks, remedies
from cloister_fl.secagg.crypto import hashes, key_agreement, keystream
from cloister_fl.secagg.fixed_point import encode_into
from cloister_fl.secagg.messages.codec import (
    Advertisement,
    Complaint,
    ConsistencyRequest,
    Consistent,
    DealtRow,
    Disclosure,
    DisclosureRequest,
    Masked,
    MaskRequest,
    ShareRequest,
    Shares,
    Unmasked,
    UnmaskRequest,
    consent_body,
)
from cloister_fl.secagg.messages.message_base import Message
from cloister_fl.secagg.round_store import RoundStore
from cloister_fl.secagg.session import EpochTerms, Session
from cloister_fl.secagg.share_keys import deal

ReplyT = TypeVar("ReplyT", bound=Message)


class Stage(enum.IntEnum):
    """How far an epoch has come at a site."""

    FRESH = 0
    ADVERTISED = 1
    SHARED = 2
    OPENED = 3
    MASKED = 4
    UNMASKED = 5
    ENDED = 6


class SiteEpoch:
    """One key epoch; ``Site`` makes it after it has checked the parameters and claimed the id.

    Every method raises a ``SecureAggregationError`` and erases all secrets where a check fails.
    """

    def __init__(
        self, identity: Identity, site: str, roster: Roster, terms: EpochTerms, store: RoundStore
    ) -> None:
        self.terms = terms
        self.stage = Stage.FRESH
        self.sid = b""
        self._identity = identity
        self._site = site
        self._roster = roster
        self._store = store
        self._b = bytearray()
        self._enc_sk = bytearray()
        self._mask_sk = bytearray()
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._dealt: dict[str, tuple[bytes, bytes]] = {}
        self._accusers: set[str] = set()
        self._records: dict[str, Advertisement] = {}
        self._keys = b""
        self._u2: tuple[str, ...] = ()
        self._session: Session | None = None
        self._own_row: DealtRow | None = None
        self._consents: dict[tuple[str, ...], bytes] = {}
        self._replies: dict[str, tuple[bytes, Message]] = {}

    def _draw(self, count: int) -> bytes:
        return secrets.token_bytes(count)

    def advertise(self) -> Advertisement:
        """Stage 0: draw b and two X25519 keys; the same record however often it is asked for."""
        if "advertise" in self._replies:
            return self._stored("advertise", b"", Advertisement)
        with self._step(Stage.FRESH):
            self._b = bytearray(self._draw(32))
            self._enc_sk = bytearray(self._draw(32))
            self._mask_sk = bytearray(self._draw(32))
            record = Advertisement(
                self.terms.kid,
                self._site,
                key_agreement.public_of(bytes(self._enc_sk)),
                key_agreement.public_of(bytes(self._mask_sk)),
                hashes.commitment(self.terms.kid, self._site, bytes(self._b)),
            ).signed_by(self._identity)
            self._replies["advertise"] = (b"", record)
            self.stage = Stage.ADVERTISED
        return record

    def share(self, request: ShareRequest) -> Shares:
        """Stage 1: deal b and mask_sk among U1 and seal the shares, one box for each peer."""
        mark = _mark(request)
        if "share" in self._replies:
            return self._stored("share", mark, Shares)
        with self._step(Stage.ADVERTISED):
            own = self._stored("advertise", b"", Advertisement)
            peer_checks.check_records(request, own, self.terms, self._roster)
            self._records = {record.site: record for record in request.records}
            self._keys = hashes.keys_digest(
                self.terms.kid, (record.record for record in request.records)
            )
            reply, self._dealt = deal(
                self._site,
                self._identity,
                records=self._records,
                epoch_keys=self._keys,
                threshold=self.terms.parameters.t,
                enc_sk=bytes(self._enc_sk),
                secrets=(bytes(self._b), bytes(self._mask_sk)),
                draw=self._draw,
            )
            self._held[self._site] = self._dealt[self._site]
            self._own_row = reply.dealing.row(self._site)
            self._replies["share"] = (mark, reply)
            self.stage = Stage.SHARED
        return reply

    def open(self, request: MaskRequest, expected: Session) -> Complaint | None:
        """Stage 2, first half: check session and boxes, before any training is paid for.

        Args:
            request: what the server sent.
            expected: the session as this site knows it, from the approved study and from the
                bytes of the model that it received.

        Returns:
            None where a vector is due; else the complaint that goes in its place. The stage is
            then asked for again, with what the dealers have disclosed.
        """
        mark = _mark(request)
        if "open" in self._replies:
            same = hmac.compare_digest(self._replies["open"][0], mark)
            fits = expected == self._session and self.stage in (Stage.OPENED, Stage.MASKED)
            if not (same and fits):
                self._refuse_repeat()
            return None
        with self._step(Stage.SHARED):
            if request.session != expected or self.terms.invited != tuple(
                site for site, _ in expected.weights
            ):
                raise SessionMismatch(
                    "The secure-aggregation session is not the approved one.",
                    why="Its round, model, length, clip or weights differ from this site's.",
                    remedy=remedies.SAME_VERSION,
                )
            assert self._own_row is not None
            opened = peer_checks.open_parcels(
                request,
                own=self._own_row,
                records=self._records,
                epoch_keys=self._keys,
                roster=self._roster,
                terms=self.terms,
                enc_sk=bytes(self._enc_sk),
            )
            if opened.unsound:
                return Complaint(self.terms.kid, self._keys, self._site, opened.unsound).signed_by(
                    self._identity
                )
            self._check_reuse(request.u2, expected)
            self._held.update(opened.shares)
            self._u2 = request.u2
            self._session = expected
            self.sid = expected.sid(self._keys)
            self._replies["open"] = (mark, request)
            _wipe(self._enc_sk)
            self.stage = Stage.OPENED
        return None

    def disclose(self, request: DisclosureRequest) -> Disclosure:
        """Stage 2: publish what this site dealt to those who say that its box does not open.

        At most c sites lie, and an honest one does not complain of this one, so more accusers are
        refused: their shares would be worth more than their word. See ``Parameters.accusers``.

        Raises:
            SignatureInvalid, SessionMismatch: see ``peer_checks.check_complaint``.
            TooManyComplaints: of more sites than may lie.
        """
        is_due = self.stage in (Stage.SHARED, Stage.OPENED, Stage.MASKED)
        with self._step(self.stage if is_due else Stage.SHARED):
            for complaint in request.complaints:
                peer_checks.check_complaint(
                    complaint, self.terms.kid, self._keys, self._records, self._roster
                )
                if self._site not in complaint.dealers:
                    raise SessionMismatch(
                        "A complaint is about another site.", remedy=remedies.SERVER_AT_FAULT
                    )
                self._accusers.add(complaint.site)
            most = self.terms.parameters.accusers
            if len(self._accusers) > most:
                raise TooManyComplaints(
                    f"{len(self._accusers)} sites say that this site's shares do not open, more "
                    f"than the {most} that may lie.",
                    remedy=remedies.REPEAT,
                )
            return Disclosure(
                self.terms.kid,
                self._site,
                tuple((one.site, b"".join(self._dealt[one.site])) for one in request.complaints),
            ).signed_by(self._identity)

    def _check_reuse(self, u2: tuple[str, ...], session: Session) -> None:
        constants = session.constants(self.terms.parameters.t)
        first = self._store.open_round(session, constants)
        if not hmac.compare_digest(first, constants):
            raise UpdateReuse(
                "The round was started with other invited sites, weights or lengths.",
                why="Two sums over the same updates could reveal one site's update.",
                remedy="Continue with the next round.",
            )
        committed = self._store.committed(session)
        if committed is not None and not {self._site, *committed} <= set(u2):
            raise UpdateReuse(
                "The round was already answered for sites that are not all present.",
                remedy=remedies.REPEAT_OR_CONTINUE,
            )

    def mask(self, update: NDArray[Any], *, saturate: bool, threads: int = 1) -> Masked:
        """Stage 2, second half: encode, weight and mask the update.

        Args:
            update: D floats before the weight; float32 or float64.
            saturate: True with differential privacy on, see ``fixed_point.encode_into``.
            threads: cores for the masks.

        Returns:
            y and its signature, and the consent to U3 = U2. Asked again it is the same object,
            whatever the update: nothing is masked twice.
        """
        if "mask" in self._replies:
            return self._stored("mask", b"", Masked)
        with self._step(Stage.OPENED):
            session = self._session
            assert session is not None
            if update.shape != (session.dimension,):
                raise SessionMismatch(
                    "The update has another length than the session.",
                    remedy=remedies.SAME_VERSION,
                )
            y = np.empty(session.dimension, np.uint32)
            encode_into(
                y,
                update,
                weight=session.weight(self._site),
                clip=session.clip,
                scale=session.scale,
                saturate=saturate,
            )
            keystream.apply(y, self._mask_keys(), threads=threads)
            vector = y.astype("<u4", copy=False).data.cast("B").toreadonly()
            u2_hash = hashes.set_hash(self._u2)
            body = Masked.body(self.sid, self._site, u2_hash, hashes.vector_hash(vector))
            reply = Masked(
                self.sid,
                self._site,
                u2_hash,
                vector,
                self._identity.sign(hashes.MASKED, *body),
                self._consent_at_once(),
            )
            self._replies["mask"] = (b"", reply)
            self.stage = Stage.MASKED
        return reply

    def _mask_keys(self) -> list[keystream.Mask]:
        u2_hash = hashes.set_hash(self._u2)
        made = [(key_agreement.self_mask_key(bytes(self._b), self._keys, self.sid, u2_hash), 1)]
        for peer in self._u2:
            if peer != self._site:
                shared = key_agreement.agree(bytes(self._mask_sk), self._records[peer].mask_pk)
                pair = (self._site, peer)
                key = key_agreement.pair_mask_key(shared, self._keys, pair, self.sid, u2_hash)
                made.append((key, 1 if self._site < peer else -1))
        return made

    def _consent_at_once(self) -> bytes:
        assert self._session is not None
        committed = self._store.committed(self._session)
        if committed not in (None, self._u2):
            return b""
        return self._sign_consent(self._u2)

    def _sign_consent(self, u3: tuple[str, ...]) -> bytes:
        body = consent_body(self.sid, self._site, self._u2, u3)
        self._consents[u3] = self._identity.sign(hashes.CONSISTENT, *body)
        return self._consents[u3]

    def consent(self, request: ConsistencyRequest) -> Consistent:
        """Stage 3, after a dropout: consent to U3, and to no other after it."""
        with self._step(Stage.MASKED):
            u3 = request.u3
            if u3 not in self._consents:
                self._check_survivors(u3)
                if any(other != self._u2 for other in self._consents):
                    raise StageRepeated(
                        "This site has consented to another set of surviving sites.",
                        why="A site consents to all sites that sent shares, and to one other set.",
                        remedy=remedies.REPEAT,
                    )
                self._sign_consent(u3)
        return Consistent(self.sid, self._site, u3, self._consents[u3])

    def _check_survivors(self, u3: tuple[str, ...]) -> None:
        assert self._session is not None
        if not set(u3) <= set(self._u2) or self._site not in u3:
            raise OverlapRefused(
                "The surviving sites do not include this site, or include one that sent no shares.",
                why="The update of a site listed as surviving and as dropped would be revealed.",
                remedy=remedies.REPEAT,
            )
        if len(u3) < self.terms.parameters.m:
            raise TooFewSurvivors(
                f"{len(u3)} sites survive; {self.terms.parameters.m} are needed.",
                remedy=remedies.REPEAT,
            )
        committed = self._store.committed(self._session)
        if committed not in (None, u3):
            raise UpdateReuse(
                "The round was already answered for other surviving sites.",
                remedy=remedies.REPEAT_OR_CONTINUE,
            )

    def unmask(self, request: UnmaskRequest) -> Unmasked:
        """Stage 4: give the shares of b for U3, and of mask_sk for U2 minus U3, once.

        U3 is written to the store before the reply exists.
        """
        mark = _mark(request)
        if "unmask" in self._replies:
            return self._stored("unmask", mark, Unmasked)
        with self._step(Stage.MASKED):
            u3 = request.u3
            self._check_survivors(u3)
            if u3 not in self._consents:
                raise OverlapRefused(
                    "This site has not consented to these surviving sites.",
                    remedy=remedies.REPEAT,
                )
            self._check_quorum(request)
            assert self._session is not None
            if self._store.commit(self._session, u3) != u3:
                raise UpdateReuse(
                    "The round was already answered for other surviving sites.",
                    remedy=remedies.REPEAT_OR_CONTINUE,
                )
            # What was dropped is this site's own conclusion, never the server's word.
            dropped = tuple(site for site in self._u2 if site not in u3)
            reply = Unmasked(
                self.sid,
                self._site,
                u3,
                tuple((dealer, self._held[dealer][0]) for dealer in u3),
                tuple((dealer, self._held[dealer][1]) for dealer in dropped),
            ).signed_by(self._identity)
            self._erase_secrets()
            self._replies["unmask"] = (mark, reply)
            self.stage = Stage.UNMASKED
        return reply

    def _check_quorum(self, request: UnmaskRequest) -> None:
        valid = 0
        for signer, signature in request.signatures:
            public = self._roster.public_key(signer)
            body = consent_body(self.sid, signer, self._u2, request.u3)
            if (
                signer in request.u3
                and public is not None
                and verify(public, signature, hashes.CONSISTENT, *body)
            ):
                valid += 1
        if valid < self.terms.parameters.t:
            raise SplitView(
                f"{valid} of {self.terms.parameters.t} sites consent to what this site sums.",
                why="The sites got different models, shares or survivors, or too few agree.",
                remedy=remedies.SERVER_AT_FAULT,
            )

    def erase(self) -> None:
        """End the epoch: overwrite secrets, forget replies."""
        self._erase_secrets()
        self._replies.clear()
        self.stage = Stage.ENDED

    def _erase_secrets(self) -> None:
        for secret in (self._b, self._enc_sk, self._mask_sk):
            _wipe(secret)
        self._held.clear()
        self._dealt.clear()
        # The masked vector is as large as the model and of no use once the sum is out.
        self._replies.pop("mask", None)

    def _stored(self, stage: str, mark: bytes, kind: type[ReplyT]) -> ReplyT:
        asked, reply = self._replies[stage]
        if not hmac.compare_digest(asked, mark):
            self._refuse_repeat()
        assert isinstance(reply, kind)
        return reply

    def _refuse_repeat(self) -> None:
        self.erase()
        raise StageRepeated(
            "A stage was requested twice with other content.",
            why="A key epoch is for one sum only.",
            remedy=remedies.REPEAT,
        )

    @contextmanager
    def _step(self, stage: Stage) -> Iterator[None]:
        """Run one stage, at its time only; whatever goes wrong in it ends the epoch."""
        try:
            if self.stage is not stage:
                self._refuse_stage(stage.name.lower())
            yield
        except BaseException:
            self.erase()
            raise

    def _refuse_stage(self, wanted: str) -> NoReturn:
        if self.stage is Stage.ENDED:
            raise SessionUnknown(
                "The key epoch has ended at this site.",
                remedy=remedies.REPEAT,
            )
        raise StageOutOfOrder(
            f"The epoch is at stage {self.stage.name.lower()}, not {wanted}.",
            remedy=remedies.REPEAT,
        )


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
    secret.clear()


def _mark(request: Message) -> bytes:
    return digest("secagg/v2/request", request.encode())
