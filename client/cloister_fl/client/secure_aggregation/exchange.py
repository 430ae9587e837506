"""The site's part in secure aggregation, between Flower's messages and the protocol's core.

One ``secagg.Site`` for each hospital and study lives in ``Members``, and nowhere else: its
secrets are never written down, and a restart gives its key epochs up. The server's requests are
input: which study, which sites, which model, how many survivors, all is checked against the study
that this site approved and the roster that it trusts. Nothing is charged or trained here: an
exchange says whether a vector is due, and the app brings it.

What a restart must not forget is in the ledger's own chain: three facts, none of them secret, which
key epochs were begun, whom a round invited, and for which sites it was answered. So whoever
restores an old copy of it to make the site answer twice rolls the privacy account back with it,
which the head of the chain, noted elsewhere, gives away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl import secagg
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.replay import Sum
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.site.trusted_roster import read_pin
from cloister_fl.errors import (
    CloisterError,
    ParameterRefused,
    RosterMismatch,
    SecureAggregationError,
    WireInvalid,
)
from cloister_fl.membership.roster import Roster
from cloister_fl.protocol.round_messages import Octets
from cloister_fl.protocol.sessions import SUMS_A_ROUND
from cloister_fl.secagg.messages.codec import Bundle, MaskRequest, Message
from cloister_fl.system import cpu
from cloister_fl.system.files import Mark, mark_of

Update = NDArray[Any]


@dataclass
class _Member:
    """This process's part of one hospital in one study."""

    protocol: secagg.Site
    roster: Roster
    threads: int
    """Cores for the masks."""
    kept: tuple[tuple[str, int, bytes], Update] | None = None
    """The last vector, by run, sum and model, for another attempt at the same sum."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One message at a time: between check and mask nothing of the epoch may change."""


_Key = tuple[Path, str, secagg.SitePolicy, Path, Mark | None]

_MEMBERS_KEPT = 4
"""Studies of one hospital that may have key epochs alive; the oldest gives way."""

_EPOCHS_A_SUM = 50
"""Key epochs that a sum may take on the average, over all attempts and repetitions of a study."""


class Members:
    """Parts in secure aggregation, of all hospitals and studies of one app."""

    def __init__(self) -> None:
        self._members: dict[_Key, _Member] = {}

    def count(self, root: Path) -> int:
        """How many studies of a site have key epochs here."""
        return sum(key[0] == root for key in self._members)

    def forget(self, root: Path) -> None:
        """Give up all key epochs of a site and overwrite their secrets."""
        for key in [key for key in self._members if key[0] == root]:
            self._members.pop(key).protocol.close()

    def of(self, session: SiteSession, admission: Admission, pin: Path) -> _Member:
        """The site's part in a study, made where it is not there.

        Raises:
            RosterInvalid, FileUnreadable: the pin cannot be used.
        """
        site, study = session.site, admission.study
        policy = secagg.SitePolicy(
            study=bytes.fromhex(admission.digest),
            colluders=study.aggregation.colluders,
            minimum_sites=max(site.policy.min_sites, study.aggregation.min_sites),
            max_weight_ratio=site.policy.max_weight_ratio,
        )
        key = (site.root, admission.digest, policy, pin, mark_of(pin))
        if key not in self._members:
            mine = [known for known in self._members if known[0] == site.root]
            roster = read_pin(pin)
            for known in mine:
                if known[:3] == key[:3] and self._members[known].roster == roster:
                    # The file is another one, and says the same.
                    self._members[key] = self._members.pop(known)
                    return self._members[key]
            for oldest in mine[: max(0, len(mine) + 1 - _MEMBERS_KEPT)]:
                self._members.pop(oldest).protocol.close()
            protocol = secagg.Site(
                identity=session.identity,
                name=site.name,
                roster=roster,
                policy=policy,
                store=RoundMemory(
                    lambda: session.ledger,
                    subject=study.update_digest,
                    is_noised=study.privacy.enabled,
                    most_epochs=_EPOCHS_A_SUM * 2 * (study.training.rounds + 1),
                ),
                gave_up=lambda error: _keep_refusal(session, error),
            )
            self._members[key] = _Member(protocol, roster, cpu.available())
        return self._members[key]


class RoundMemory:
    """A ``secagg.RoundStore`` on disk; every method is one durable transaction.

    Args:
        ledger: gives the open ledger, which a session may have opened anew meanwhile.
        subject: 32 bytes over all that determines an update. With privacy on that is the study,
            for each study draws its own noise and is charged for it; without, studies that differ
            in name alone give the same updates, and two sums of these over other sites would tell
            of single hospitals.
        is_noised: whether vectors are noised anew for each sum, and charged. Where they are not,
            two sums over one model count as the same sum, whatever the study and the round: studies
            that differ in rounds or batches train the same way for a round or nearly so. It guards
            against accidents; a coordinator that changes one bit of the model evades it.
        most_epochs: key epochs that one subject may begin, so that no server fills the ledger.

    The methods raise LedgerDamaged and LedgerRolledBack, see ``Ledger``.
    """

    def __init__(
        self,
        ledger: Callable[[], Ledger],
        *,
        subject: bytes,
        is_noised: bool,
        most_epochs: int,
    ) -> None:
        self._ledger = ledger
        self._is_noised = is_noised
        self._subject = subject.hex()
        self._most_epochs = most_epochs

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch's id; whether it was new.

        Raises:
            ParameterRefused: the subject has begun too many.
        """
        with self._ledger().file.transaction(write=True) as state:
            if kid.hex() in state.epochs:
                return False
            begun = state.begun[self._subject]
            if begun >= self._most_epochs:
                raise ParameterRefused(
                    f"The study has started {begun} key epochs here, more than it can need.",
                    why="The coordinator is faulty, or the study was run very often.",
                    remedy="Ask the coordinator, and propose a new study.",
                )
            self._ledger().file.append("epoch", {"epoch": kid.hex(), "study": self._subject})
            return True

    def open_round(self, session: secagg.Session, constants: bytes) -> bytes:
        """Record a sum's constants; what stands since the first time."""
        with self._ledger().file.transaction(write=True) as state:
            for key in self._keys(session):
                if key not in state.constants:
                    self._append("round", key, {"constants": constants.hex()})
                elif state.constants[key] != constants.hex():
                    return bytes.fromhex(state.constants[key])
        return constants

    def committed(self, session: secagg.Session) -> tuple[str, ...] | None:
        """The sites that a sum was answered for, or None."""
        with self._ledger().file.transaction(write=False) as state:
            for key in self._keys(session):
                if key in state.answered:
                    return state.answered[key]
        return None

    def commit(self, session: secagg.Session, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the sites that a sum is answered for; what stands since the first time."""
        with self._ledger().file.transaction(write=True) as state:
            for key in self._keys(session):
                if key not in state.answered:
                    self._append("answered", key, {"survivors": list(u3)})
                elif state.answered[key] != u3:
                    return state.answered[key]
        return u3

    def _keys(self, session: secagg.Session) -> tuple[Sum, ...]:
        """What the sum may be known by: no two of one key are over other sites."""
        own = (self._subject, session.round)
        if self._is_noised:
            return (own,)
        # Updates and counts of one model are two sums, and their numbers tell which.
        return own, (session.model.hex(), session.round % SUMS_A_ROUND)

    def _append(self, kind: str, key: Sum, fact: dict[str, Any]) -> None:
        self._ledger().file.append(kind, {"study": key[0], "sum": key[1], **fact})


def require_roster(session: SiteSession, pin: Path, digest: str) -> None:
    """Refuse a run over another roster than the trusted one, or one without this site.

    Raises:
        RosterMismatch: see above.
        RosterInvalid, FileUnreadable: the pin cannot be used.
    """
    site, roster = session.site, read_pin(pin)
    if roster.digest.hex() != digest:
        raise RosterMismatch(
            "The run is for another roster than the trusted one of this site.",
            remedy="Compare the roster with the other sites, then accept it or not: "
            + site.command("roster"),
        )
    if roster.public_key(site.name) != session.identity.public:
        raise RosterMismatch(
            "The trusted roster does not list this site with its own key.",
            remedy="Ask the coordinator to enrol this site's key, then accept that roster: "
            + site.command("roster"),
        )


class Exchange:
    """One message of the server, and this site's answers to its parts.

    Use it as a context, which keeps other messages to the same part of the site out. In it, in this
    order: ``open``; where that says that a vector is due, charge, make one and ``keep`` it;
    ``mask``; ``answer``. An error between ``open`` and ``mask`` gives the key epoch up. Without a
    mask request, ``answer`` alone.

    Args:
        session: of the hospital.
        admission: of the study.
        pin: file of the trusted roster.
        data: a ``Bundle``, encoded.
        members: where the site's part in the study lives.

    Raises:
        WireInvalid: the bytes are no bundle of requests, or ask for two vectors.
        RosterMismatch, RosterInvalid, FileUnreadable: see ``require_roster``.
    """

    def __init__(
        self,
        session: SiteSession,
        admission: Admission,
        pin: Path,
        data: Octets,
        members: Members,
    ) -> None:
        message = secagg.decode(data.tobytes())
        if not isinstance(message, Bundle):
            raise WireInvalid("The message is not a bundle of requests.")
        self._parts = message.parts
        masks = [part for part in self._parts if isinstance(part, MaskRequest)]
        if len(masks) > 1:
            raise WireInvalid("One message requests two vectors.")
        self.mask_request = masks[0] if masks else None
        self._member = members.of(session, admission, pin)
        self._mark: tuple[str, int, bytes] | None = None
        self._masked: Message | None = None
        self._is_open = False

    def __enter__(self) -> Exchange:
        self._member.lock.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and self._is_open and self.mask_request is not None:
                told = error if isinstance(error, Exception) else RuntimeError()
                self._member.protocol.abort(self.mask_request.kid, told)
        finally:
            self._member.lock.release()

    @property
    def roster(self) -> Roster:
        """The trusted roster."""
        return self._member.roster

    def open(self, expected: secagg.Session, *, run: str) -> bool:
        """Check the session of the mask request; whether a vector is due.

        None is due where a check failed or a dealer's box does not open, which the answer then
        says; where the vector was masked before, or made before for another attempt at the same
        sum in this process.

        Args:
            expected: the session as this site knows it.
            run: the run, which a kept vector belongs to.
        """
        request, member = self.mask_request, self._member
        assert request is not None
        self._mark, self._is_open = (run, expected.round, expected.model), True
        try:
            complaint = member.protocol.open(request, expected)
        except SecureAggregationError as error:
            self._give_up(error)
            return False
        if complaint is not None:
            self._masked, self._is_open = complaint, False
            return False
        if member.protocol.has_masked(request.kid):
            return False
        if member.kept is not None and member.kept[0] == self._mark:
            return False
        member.kept = None
        return True

    def keep(self, vector: Update) -> None:
        """Take the vector that was due, also for another attempt at the same sum."""
        assert self._mark is not None
        self._member.kept = (self._mark, vector)

    def mask(self, *, saturate: bool) -> None:
        """Mask the vector, unless a check failed; what was masked before is given again.

        Args:
            saturate: see ``fixed_point.encode_into``.
        """
        request, member = self.mask_request, self._member
        assert request is not None
        if self._masked is not None:
            return
        vector = np.empty(0) if member.kept is None else member.kept[1]
        try:
            self._masked = member.protocol.mask(
                request.kid, vector, saturate=saturate, threads=member.threads
            )
        except SecureAggregationError as error:
            self._give_up(error)
        self._is_open = False

    def _give_up(self, error: SecureAggregationError) -> None:
        assert self.mask_request is not None
        self._masked = self._member.protocol.abort(self.mask_request.kid, error)
        self._is_open = False

    def answer(self) -> bytes:
        """The answers to all parts, as one bundle."""
        answers = []
        for part in self._parts:
            if isinstance(part, MaskRequest):
                assert self._masked is not None
                answers.append(self._masked)
            else:
                answers.append(self._member.protocol.respond(part))
        return Bundle(tuple(answers)).encode()


def _keep_refusal(session: SiteSession, error: Exception) -> None:
    if isinstance(error, CloisterError):
        session.keep_refusal(error)
