"""The server's side of the protocol: collection, sum, recovery of dropouts, blame.

``receive`` methods raise where a message is refused; the state is then as before it, so one
site's bad message costs that site its place and no other. Masked vectors are added as they come:
memory is O(D), whatever the number of sites, unless vectors are kept for a record of the sum.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Collection
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cloister_fl.errors import (
    OverlapRefused,
    RosterMismatch,
    SecureAggregationError,
    SessionMismatch,
    SignatureInvalid,
    StageOutOfOrder,
    StageRepeated,
    TooFewSurvivors,
    WireInvalid,
)
from cloister_fl.membership.identity import verify
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg import peer_checks, unmasking
from cloister_fl.secagg.complaint_book import Complaints
from cloister_fl.secagg.crypto import hashes
from cloister_fl.secagg.messages.abort_codes import ABORT_CODES
from cloister_fl.secagg.messages.codec import (
    Abort,
    Advertisement,
    AdvertiseRequest,
    Complaint,
    ConsistencyRequest,
    Consistent,
    Disclosure,
    DisclosureRequest,
    Masked,
    MaskRequest,
    Message,
    Parcel,
    ShareRequest,
    Shares,
    Unmasked,
    UnmaskRequest,
    consent_body,
)
from cloister_fl.secagg.remedies import ASK_STEWARD, MORE_SITES, REPEAT, SAME_VERSION
from cloister_fl.secagg.session import EpochTerms, Session
from cloister_fl.secagg.unmasking import Aggregate

ValueT = TypeVar("ValueT")


class Phase(enum.IntEnum):
    """What the server is collecting."""

    KEYS = 0
    SHARES = 1
    READY = 2
    VECTORS = 3
    CONSENTS = 4
    UNMASKING = 5
    DONE = 6


class ServerEpoch:
    """One key epoch at the server, from its first request to the sum.

    Args:
        terms: what the epoch is for.
        roster: the federation's roster, which the terms name.
        threads: cores for taking masks away.
        keep: whether the masked vectors are kept for a record of the sum; see ``rests_on``.

    Raises:
        RosterMismatch: the terms name another roster.
    """

    def __init__(
        self, terms: EpochTerms, roster: Roster, *, threads: int = 1, keep: bool = False
    ) -> None:
        if terms.roster != roster.digest:
            raise RosterMismatch("The key epoch is for another roster.", remedy=REPEAT)
        self.terms = terms
        self.phase = Phase.KEYS
        self.sid = b""
        self.aborted: dict[str, Abort] = {}
        """Sites that aborted the key epoch, and what they signed."""
        self._roster = roster
        self._threads = threads
        self._records: dict[str, Advertisement] = {}
        self._keys = b""
        self._shares: dict[str, Shares] = {}
        self._complaints = Complaints()
        self._u2: tuple[str, ...] = ()
        self._u3: tuple[str, ...] = ()
        self._awaited: frozenset[str] = frozenset()
        self._session: Session | None = None
        self._total: NDArray[np.uint32] | None = None
        self._added: dict[str, bytes] = {}
        self._kept: dict[str, Masked] | None = {} if keep else None
        self._consents: dict[str, bytes] = {}
        self._unmasked: dict[str, Unmasked] = {}

    # Stage 0

    def advertise_request(self) -> AdvertiseRequest:
        """The request to every invited site."""
        parameters = self.terms.parameters
        return AdvertiseRequest(self.terms, parameters.t, parameters.m)

    def receive_advertisement(self, record: Advertisement) -> None:
        """Take one site's keys.

        Raises:
            StageOutOfOrder, StageRepeated, SiteAborted: it does not come in its turn.
            RosterMismatch, EpochReused: it is not of this epoch, or its site was not invited.
            SignatureInvalid, LowOrderKey: a key cannot be used.
            KeyReused: two sites sent one key; the other's record is dropped, too.
        """
        self._expect(Phase.KEYS)
        peer_checks.check_record(record, self.terms, self._roster)
        if _known(self._records, record.site, record):
            return
        try:
            peer_checks.check_distinct({**self._records, record.site: record})
        except SecureAggregationError as error:
            # Nobody knows whose key it is: neither takes part.
            for site in error.blamed_sites:
                self._records.pop(site, None)
            raise
        self._records[record.site] = record

    # Stage 1

    def share_request(self) -> ShareRequest:
        """Close stage 0; the request to every site of U1.

        Raises:
            TooFewSurvivors: fewer than m sites sent keys.
        """
        if self.phase is Phase.KEYS:
            records = self._in_order(self._records)
            self._require_m(len(records), "sent keys")
            self._records = records
            self._keys = hashes.keys_digest(
                self.terms.kid, (record.record for record in records.values())
            )
            self.phase = Phase.SHARES
        self._expect(Phase.SHARES)
        return ShareRequest(self.terms.kid, tuple(self._records.values()))

    def receive_shares(self, shares: Shares) -> None:
        """Take one dealer's boxes.

        Raises:
            StageOutOfOrder, StageRepeated: it does not come in its turn.
            SignatureInvalid, DealerBlamed: what the dealer signed is not sound.
            SessionMismatch: another epoch.
            OverlapRefused: not from a site of U1.
        """
        self._expect(Phase.SHARES)
        dealer = shares.dealing.dealer
        if dealer not in self._records:
            raise OverlapRefused("A site sent shares, but no keys.", remedy=REPEAT)
        if not hmac.compare_digest(shares.kid, self.terms.kid):
            raise SessionMismatch("Shares belong to another key epoch.", remedy=REPEAT)
        u1 = tuple(self._records)
        peer_checks.check_dealing(shares.dealing, u1, self._keys, self._roster)
        peer_checks.check_boxes(shares, self._keys)
        if not _known(self._shares, dealer, shares):
            self._shares[dealer] = shares

    # Stage 2

    def start(self, session: Session, *, only: Collection[str] | None = None) -> tuple[str, ...]:
        """Close stage 1 and begin a sum; the sites to send a ``MaskRequest``.

        Args:
            session: the constants of the sum.
            only: where an earlier attempt at the round asked for stage 4, the U3 that it asked
                for: no site answers for another.

        Raises:
            TooFewSurvivors: fewer than m sites dealt, or of ``only`` one is missing.
            SessionMismatch: the weights are not those of the invited sites.
        """
        self._expect(Phase.SHARES)
        if tuple(site for site, _ in session.weights) != self.terms.invited:
            raise SessionMismatch(
                "The session's weights are not for the invited sites.", remedy=REPEAT
            )
        dealt = self._in_order(self._shares)
        self._require_m(len(dealt), "sent shares")
        awaited = frozenset(dealt) if only is None else frozenset(only)
        if not awaited <= dealt.keys():
            raise TooFewSurvivors(
                "A site is missing that this round was answered for.", remedy=MORE_SITES
            )
        self._u2 = tuple(dealt)
        self._awaited = awaited
        self._session = session
        self.sid = session.sid(self._keys)
        self._total = np.zeros(session.dimension, np.uint32)
        self.phase = Phase.VECTORS
        return tuple(site for site in self._u2 if site in awaited)

    def mask_request(self, site: str) -> MaskRequest:
        """The request to one site: the session and the boxes that are for it."""
        self._expect(Phase.VECTORS)
        if site not in self._awaited or self._session is None:
            raise OverlapRefused(f"{site} does not take part in this sum.", remedy=REPEAT)
        disclosed = self._complaints.disclosed_to(site)
        parcels = tuple(
            Parcel(
                self._shares[dealer].dealing.row(site),
                self._shares[dealer].box_for(site),
                disclosed.get(dealer, b""),
            )
            for dealer in self._u2
        )
        return MaskRequest(self.terms.kid, self._session, parcels)

    def receive_complaint(self, complaint: Complaint) -> None:
        """Take one site's complaint that boxes, each as its dealer signed it, do not open.

        Raises:
            StageOutOfOrder, StageRepeated: it does not come in its turn, or the site has what it
                lacked.
            OverlapRefused: the site takes no part, or has sent its vector.
            SignatureInvalid, SessionMismatch: see ``peer_checks.check_complaint``.
        """
        self._expect(Phase.VECTORS)
        self._member_key(complaint.site, self._awaited - self._added.keys())
        peer_checks.check_complaint(complaint, self.terms.kid, self._keys, self._u2, self._roster)
        if complaint.site in self._complaints.settled:
            raise StageRepeated(
                f"{complaint.site} complains of shares that were published to it.", remedy=REPEAT
            )
        if not _known(self._complaints.made, complaint.site, complaint):
            self._complaints.made[complaint.site] = complaint

    def disclosure_requests(self) -> dict[str, DisclosureRequest]:
        """The request to each dealer that somebody complains of, and that has not answered yet.

        Not to one of whom more complain than may lie: it would give the key epoch up.
        """
        self._expect(Phase.VECTORS)
        return self._complaints.requests(self.terms.kid, self.terms.parameters.accusers)

    def receive_disclosure(self, answer: Disclosure) -> None:
        """Take a dealer's shares for its accusers, each checked against the hash that it signed.

        Raises:
            StageOutOfOrder, StageRepeated: it does not come in its turn.
            OverlapRefused, SessionMismatch: nobody complained of it, or it is of another epoch.
            SignatureInvalid: it is not the site's.
            DealerBlamed: a share is missing or another than was signed: the complaint is right.
        """
        self._expect(Phase.VECTORS)
        accusers = self._complaints.accusers_of(answer.site)
        public = self._member_key(answer.site, self._u2 if accusers else ())
        if not answer.verified(public):
            raise SignatureInvalid(f"The shares in the name of {answer.site} are not signed by it.")
        if not hmac.compare_digest(answer.kid, self.terms.kid):
            raise SessionMismatch(f"{answer.site} answers for another key epoch.", remedy=REPEAT)
        peer_checks.check_disclosure(
            answer, accusers, self._shares[answer.site].dealing, self._keys
        )
        if not _known(self._complaints.answers, answer.site, answer):
            self._complaints.answers[answer.site] = answer

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Dealers that somebody complains of, and whose shares for it are not here."""
        return self._complaints.unanswered

    @property
    def overaccused(self) -> tuple[str, ...]:
        """Dealers of whom more sites complain than may lie, so that one of these does not."""
        return self._complaints.accused_by_more_than(self.terms.parameters.accusers)

    @property
    def accusers(self) -> tuple[str, ...]:
        """Sites that complained, have the shares that they lacked by now, and sent no vector."""
        return tuple(site for site in self._complaints.settled if site not in self._added)

    def receive_masked(self, masked: Masked) -> None:
        """Check one masked vector, add it to the sum and let go of it.

        Raises:
            StageOutOfOrder, StageRepeated: it does not come in its turn.
            SignatureInvalid: it is not the site's.
            OverlapRefused: the site takes no part.
            SessionMismatch: another session, length, or other boxes than were sent.
        """
        self._expect(Phase.VECTORS)
        public = self._member_key(masked.site, self._awaited)
        assert self._total is not None
        if not hmac.compare_digest(masked.sid, self.sid) or not hmac.compare_digest(
            masked.u2_hash, hashes.set_hash(self._u2)
        ):
            raise SessionMismatch(f"{masked.site} masked for another session.", remedy=REPEAT)
        if len(masked.vector) != 4 * self._total.size:
            raise SessionMismatch(f"{masked.site} sent a vector of another length.", remedy=REPEAT)
        if not masked.verified(public):
            raise SignatureInvalid(f"The vector in the name of {masked.site} is not signed by it.")
        if masked.consent:
            self._check_consent(masked.site, public, self._u2, masked.consent)
        if _known(self._added, masked.site, masked.signature):
            return
        np.add(self._total, np.frombuffer(masked.vector, "<u4"), out=self._total)
        self._added[masked.site] = masked.signature
        if self._kept is not None:
            self._kept[masked.site] = masked
        if masked.consent:
            self._consents[masked.site] = masked.consent

    # Stage 3

    def close_vectors(self) -> ConsistencyRequest | None:
        """Close stage 2 and fix U3; the request to its members, or None where none is needed.

        It is needed after a dropout, and where a vector came without a consent: whoever withholds
        it is then asked for it, and does not lessen the consents unnoticed.

        Raises:
            TooFewSurvivors: fewer than m vectors came.
        """
        if self.phase is Phase.VECTORS:
            survivors = tuple(site for site in self._u2 if site in self._added)
            self._require_m(len(survivors), "sent a vector")
            if self._awaited != frozenset(self._u2) and frozenset(survivors) != self._awaited:
                raise TooFewSurvivors(
                    "A site is missing that this round was answered for.",
                    remedy=MORE_SITES,
                )
            self._u3 = survivors
            if survivors != self._u2:
                self._consents.clear()
            self.phase = Phase.CONSENTS
        self._expect(Phase.CONSENTS)
        has_all = self._consents.keys() == set(self._u3)
        return None if has_all else ConsistencyRequest(self.sid, self._u3)

    @property
    def survivors(self) -> tuple[str, ...]:
        """U3, once it is fixed."""
        return self._u3

    def receive_consistent(self, reply: Consistent) -> None:
        """Take one site's consent to U3.

        Raises:
            StageOutOfOrder: it does not come in its turn.
            OverlapRefused, SessionMismatch: it is not from a site of U3, or of another sum.
            SignatureInvalid: it is not the site's.
        """
        self._expect(Phase.CONSENTS)
        public = self._member_key(reply.site, self._u3)
        if not hmac.compare_digest(reply.sid, self.sid) or reply.u3 != self._u3:
            raise SessionMismatch(f"{reply.site} consents to another sum.", remedy=REPEAT)
        self._check_consent(reply.site, public, self._u3, reply.signature)
        self._consents[reply.site] = reply.signature

    def _check_consent(
        self, site: str, public: bytes, u3: tuple[str, ...], signature: bytes
    ) -> None:
        body = consent_body(self.sid, site, self._u2, u3)
        if not verify(public, signature, hashes.CONSISTENT, *body):
            raise SignatureInvalid(f"The consent in the name of {site} is not signed by it.")

    # Stage 4

    def unmask_request(self) -> UnmaskRequest:
        """Close stage 3; the request to every site of U3.

        The round is bound to U3 from here on: see ``only`` of ``start``.

        Raises:
            TooFewSurvivors: fewer than t sites consent.
        """
        if self.phase is Phase.CONSENTS:
            t = self.terms.parameters.t
            if len(self._consents) < t:
                raise TooFewSurvivors(
                    f"{len(self._consents)} sites consent; {t} are needed.",
                    remedy=REPEAT,
                )
            self.phase = Phase.UNMASKING
        self._expect(Phase.UNMASKING)
        signatures = tuple(self._in_order(self._consents).items())
        return UnmaskRequest(self.sid, self._u3, signatures)

    def receive_unmasked(self, reply: Unmasked) -> None:
        """Take one site's shares, each checked against the hash that its dealer signed.

        Raises:
            StageOutOfOrder, StageRepeated: it does not come in its turn.
            OverlapRefused, SessionMismatch: it is not from a site of U3, or of another sum.
            SignatureInvalid: it is not the site's.
            ShareMismatch: blames the holder.
        """
        self._expect(Phase.UNMASKING)
        public = self._member_key(reply.site, self._u3)
        if not reply.verified(public):
            raise SignatureInvalid(f"The shares in the name of {reply.site} are not signed by it.")
        if not hmac.compare_digest(reply.sid, self.sid) or reply.u3 != self._u3:
            raise SessionMismatch(f"{reply.site} unmasks another sum.", remedy=REPEAT)
        dealings = {dealer: shares.dealing for dealer, shares in self._shares.items()}
        peer_checks.check_shares(reply, dealings, self._u2, self._keys)
        if not _known(self._unmasked, reply.site, reply):
            self._unmasked[reply.site] = reply

    def finish(self) -> Aggregate:
        """Rebuild the secrets, take the masks away, and give the sum.

        Raises:
            TooFewSurvivors: fewer than t sites sent shares.
            DealerBlamed: a dealer's shares rebuild a secret that is not its own.
        """
        self._expect(Phase.UNMASKING)
        t = self.terms.parameters.t
        if len(self._unmasked) < t:
            raise TooFewSurvivors(
                f"{len(self._unmasked)} sites sent shares; {t} are needed.",
                remedy="Repeat the round, for the same surviving sites, in a new key epoch.",
            )
        assert self._total is not None
        assert self._session is not None
        unmasking.unmask(
            self._total,
            records=self._records,
            keys_digest=self._keys,
            sid=self.sid,
            u2=self._u2,
            u3=self._u3,
            replies=self._in_order(self._unmasked),
            threshold=t,
            threads=self._threads,
        )
        total, self._total = self._total, None
        self.phase = Phase.DONE
        weights = sum(self._session.weight(site) for site in self._u3)
        return Aggregate(total, self._session.scale, self._u3, weights)

    def rests_on(self) -> tuple[Message, ...]:
        """The sites' messages that the sum follows from, by stage and rising site id.

        After ``finish`` alone, and where vectors are kept: of an epoch without a sum, nothing is
        to be recorded.

        Raises:
            StageOutOfOrder: there is no sum.
        """
        self._expect(Phase.DONE)
        kept = self._in_order(self._kept or {})
        # Without a dropout, a consent is in the site's masked vector as a rule.
        at_once = {site for site, masked in kept.items() if masked.consent}
        consents = [
            Consistent(self.sid, site, self._u3, signature)
            for site, signature in self._in_order(self._consents).items()
            if self._u3 != self._u2 or site not in at_once
        ]
        return (
            *self._records.values(),
            *self._in_order(self._shares).values(),
            *kept.values(),
            *consents,
            *self._in_order(self._unmasked).values(),
        )

    # Any stage

    def receive_abort(self, abort: Abort) -> None:
        """Take note that a site gave the epoch up; what it has sent stays, as for a dropout.

        Raises:
            RosterMismatch, SessionMismatch: the site was not invited, or it is of another epoch.
            SignatureInvalid: it is not the site's.
            WireInvalid: the code is not on the closed list.
        """
        public = self._roster.public_key(abort.site)
        if public is None or abort.site not in self.terms.invited:
            raise RosterMismatch("An abort is from a site that was not invited.", remedy=REPEAT)
        if not hmac.compare_digest(abort.kid, self.terms.kid):
            raise SessionMismatch("An abort belongs to another key epoch.", remedy=REPEAT)
        if not abort.verified(public):
            raise SignatureInvalid(f"The abort in the name of {abort.site} is not signed by it.")
        if abort.code not in ABORT_CODES:
            raise WireInvalid(
                "An abort has a code that is not on the closed list.",
                remedy=SAME_VERSION,
            )
        self.aborted[abort.site] = abort

    def _member_key(self, site: str, members: Collection[str]) -> bytes:
        public = self._roster.public_key(site)
        if site not in members or public is None:
            raise OverlapRefused(f"{site} sent a message but does not take part.", remedy=REPEAT)
        return public

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise StageOutOfOrder(
                f"The key epoch collects {self.phase.name.lower()}, not {phase.name.lower()}.",
                remedy=REPEAT,
            )

    def _require_m(self, count: int, what: str) -> None:
        m = self.terms.parameters.m
        if count < m:
            raise TooFewSurvivors(
                f"{count} sites {what}; {m} are needed.",
                remedy=MORE_SITES,
            )

    def _in_order(self, by_site: dict[str, ValueT]) -> dict[str, ValueT]:
        return {site: by_site[site] for site in self.terms.invited if site in by_site}


def _known(held: dict[str, ValueT], site: str, value: ValueT) -> bool:
    """True where the very same was taken before; what differs is refused."""
    if site not in held:
        return False
    if held[site] != value:
        raise StageRepeated(
            f"{site} sent two different messages for one stage.",
            remedy=ASK_STEWARD,
            blamed=site,
        )
    return True
