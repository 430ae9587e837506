"""The site's side of the protocol: admission of key epochs, stages and signed aborts.

A site holds at most two epochs alive: the one whose sum is under way and the one whose keys
were sent ahead. All of a site's work goes through one ``Site`` in one process.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cloister_fl.errors import (
    EpochReused,
    ParameterRefused,
    RosterMismatch,
    SecureAggregationError,
    SessionUnknown,
    SiteAborted,
    WeightAboveCap,
    WireInvalid,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg import remedies
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
    ShareRequest,
    Shares,
    Unmasked,
    UnmaskRequest,
)
from cloister_fl.secagg.parameters import DEFAULT_COLLUDERS, DEFAULT_MINIMUM_SITES
from cloister_fl.secagg.participant_epoch import SiteEpoch, Stage
from cloister_fl.secagg.round_store import RoundStore
from cloister_fl.secagg.session import EpochTerms, Session

LIVE_EPOCHS = 2


@dataclass(frozen=True)
class SitePolicy:
    """What this site has approved; a request must say the same.

    Attributes:
        study: hash of the approved study, 32 bytes.
        colluders: c, sites that may collude with the server.
        minimum_sites: fewest invited sites.
        max_weight_ratio: most that the largest public weight of a sum may be of the smallest; 1
            wants all alike. A site whose weight is far above the others' has the sum to itself.
    """

    study: bytes
    colluders: int = DEFAULT_COLLUDERS
    minimum_sites: int = DEFAULT_MINIMUM_SITES
    max_weight_ratio: float = 1.0


class Site:
    """Answers the server's requests, one method a stage.

    Every method raises a ``SecureAggregationError`` where a check fails; the epoch is then
    over at this site, no secret has left, and ``abort`` makes the signed message that says so.

    Args:
        identity: the site's own key.
        name: the site's id.
        roster: the roster that the site's steward accepted.
        policy: what was approved.
        store: what the site remembers across restarts.
        gave_up: is told why, whenever the site gives an epoch up; for its own operator.

    Raises:
        RosterMismatch: the roster does not hold this site with this key.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        name: str,
        roster: Roster,
        policy: SitePolicy,
        store: RoundStore,
        gave_up: Callable[[Exception], None] | None = None,
    ) -> None:
        if roster.public_key(name) != identity.public:
            raise RosterMismatch(
                "The trusted roster does not list this site with its key.",
                remedy=remedies.ACCEPT_ROSTER,
            )
        self._identity = identity
        self._name = name
        self._roster = roster
        self._policy = policy
        self._store = store
        self._gave_up = gave_up
        self._epochs: dict[bytes, SiteEpoch] = {}

    def advertise(self, request: AdvertiseRequest) -> Advertisement:
        """Stage 0: check the epoch's parameters, claim the epoch's id, make its keys.

        Raises:
            ParameterRefused: study, c, t, m or the number of sites is not as approved.
            RosterMismatch: another federation or roster, or this site is not invited.
            EpochReused: the id was claimed before, in this process or an earlier one.
        """
        terms = request.terms
        self._check_terms(request)
        if terms.kid not in self._epochs:
            if not self._store.claim_epoch(terms.kid):
                raise EpochReused(
                    "The key epoch was used before.",
                    why="Its secrets are erased, or must not be used twice.",
                    remedy=remedies.NEW_EPOCH,
                )
            while len(self._epochs) >= LIVE_EPOCHS:
                self._epochs.pop(next(iter(self._epochs))).erase()
            self._epochs[terms.kid] = self._make_epoch(terms)
        return self._epochs[terms.kid].advertise()

    def _make_epoch(self, terms: EpochTerms) -> SiteEpoch:
        return SiteEpoch(self._identity, self._name, self._roster, terms, self._store)

    def _check_terms(self, request: AdvertiseRequest) -> None:
        terms, derived = request.terms, request.terms.parameters
        if not hmac.compare_digest(terms.roster, self._roster.digest):
            raise RosterMismatch(
                "The key epoch is for another roster than the trusted one.",
                remedy=remedies.ACCEPT_ROSTER,
            )
        if terms.federation != self._roster.federation:
            raise RosterMismatch(
                "The key epoch is for another federation.",
                remedy="Ask the coordinator which federation the run belongs to.",
            )
        if not set(terms.invited) <= set(self._roster.sites) or self._name not in terms.invited:
            raise RosterMismatch(
                "A site that is not on the roster is invited, or this site is not invited.",
                remedy=remedies.ACCEPT_ROSTER,
            )
        if not hmac.compare_digest(terms.study, self._policy.study):
            raise ParameterRefused(
                "The key epoch is for a study that is not approved here.",
                remedy="See the studies that wait: cloister client review --dir FOLDER",
            )
        if terms.colluders != self._policy.colluders:
            raise ParameterRefused(
                f"The key epoch tolerates {terms.colluders} colluding sites, "
                f"this site {self._policy.colluders}.",
                remedy="Set policy.colluders of the site and aggregation.colluders of the study "
                "to the same number.",
            )
        if (request.threshold, request.survivors) != (derived.t, derived.m):
            raise ParameterRefused(
                f"The server asks for t = {request.threshold}, m = {request.survivors}; "
                f"{derived.n} sites need t = {derived.t}, m = {derived.m}.",
                remedy=remedies.SAME_VERSION,
            )
        if derived.n < self._policy.minimum_sites:
            raise ParameterRefused(
                f"{derived.n} sites are invited; this site requires {self._policy.minimum_sites}.",
                remedy="The coordinator must invite more sites, or lower policy.min_sites.",
            )

    def share(self, request: ShareRequest) -> Shares:
        """Stage 1; see ``SiteEpoch.share``."""
        return self._by_kid(request.kid).share(request)

    def open(self, request: MaskRequest, expected: Session) -> Complaint | None:
        """Stage 2, first half; see ``SiteEpoch.open``. Train after it, not before.

        Raises:
            WeightAboveCap: the public weights differ by more than this site allows.
        """
        smallest, largest = expected.weight_range
        if largest > smallest * self._policy.max_weight_ratio:
            raise WeightAboveCap(
                f"The weights of the sites differ by a factor of {largest / smallest:.6g}; this "
                f"site allows {self._policy.max_weight_ratio:g}.",
                why="The sum would be little but the update of the site with the largest.",
                remedy="Propose a study without aggregation.weights, or raise "
                "policy.max_weight_ratio in site.toml.",
            )
        return self._by_kid(request.kid).open(request, expected)

    def disclose(self, request: DisclosureRequest) -> Disclosure:
        """Stage 2, where others complain of this site's boxes; see ``SiteEpoch.disclose``."""
        return self._by_kid(request.kid).disclose(request)

    def has_masked(self, kid: bytes) -> bool:
        """Whether the epoch's vector was made already; it is then given again, never made anew."""
        return self._by_kid(kid).stage is Stage.MASKED

    def mask(self, kid: bytes, update: NDArray[Any], *, saturate: bool, threads: int = 1) -> Masked:
        """Stage 2, second half; see ``SiteEpoch.mask``."""
        return self._by_kid(kid).mask(update, saturate=saturate, threads=threads)

    def consent(self, request: ConsistencyRequest) -> Consistent:
        """Stage 3, after a dropout; see ``SiteEpoch.consent``."""
        return self._by_sid(request.sid).consent(request)

    def unmask(self, request: UnmaskRequest) -> Unmasked:
        """Stage 4; see ``SiteEpoch.unmask``."""
        return self._by_sid(request.sid).unmask(request)

    def respond(self, request: Message) -> Message:
        """Answer any request but a ``MaskRequest``; a signed abort where a check fails.

        Raises:
            WireInvalid: the message is not a request of this kind.
        """
        try:
            match request:
                case AdvertiseRequest():
                    return self.advertise(request)
                case ShareRequest():
                    return self.share(request)
                case DisclosureRequest():
                    return self.disclose(request)
                case ConsistencyRequest():
                    return self.consent(request)
                case UnmaskRequest():
                    return self.unmask(request)
        except SecureAggregationError as error:
            return self.abort(self._kid_of(request), error)
        raise WireInvalid("The message is not a request that can be answered without an update.")

    def abort(self, kid: bytes, error: Exception) -> Abort:
        """Give an epoch up and say why, in a code of the closed list and no word more."""
        epoch = self._epochs.pop(kid, None)
        if epoch is not None:
            epoch.erase()
        if self._gave_up is not None:
            self._gave_up(error)
        code = getattr(error, "code", "")
        return Abort(kid, self._name, code if code in ABORT_CODES else SiteAborted.code).signed_by(
            self._identity
        )

    def close(self) -> None:
        """End all epochs and overwrite their secrets."""
        for epoch in self._epochs.values():
            epoch.erase()
        self._epochs.clear()

    def _kid_of(self, request: Message) -> bytes:
        match request:
            case AdvertiseRequest():
                return request.terms.kid
            case ShareRequest() | DisclosureRequest():
                return request.kid
            case ConsistencyRequest() | UnmaskRequest():
                for kid, epoch in self._epochs.items():
                    if hmac.compare_digest(epoch.sid, request.sid):
                        return kid
        return bytes(32)

    def _by_kid(self, kid: bytes) -> SiteEpoch:
        epoch = self._epochs.get(kid)
        if epoch is None:
            raise SessionUnknown(
                "This site has no such key epoch.",
                why="It was never started here, was aborted, or ended with a restart.",
                remedy=remedies.NEW_EPOCH,
            )
        return epoch

    def _by_sid(self, sid: bytes) -> SiteEpoch:
        for epoch in self._epochs.values():
            if epoch.sid and hmac.compare_digest(epoch.sid, sid):
                return epoch
        raise SessionUnknown(
            "This site has no such secure-aggregation session.",
            why="It was never opened here, was aborted, or is over another model.",
            remedy=remedies.REPEAT,
        )
