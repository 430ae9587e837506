"""The site's part in secure aggregation, between Flower's messages and the protocol's core.

One ``secagg.Site`` for each hospital and study lives in ``Members``, and nowhere else: its
secrets are never written down, and a restart gives its key epochs up. The server's requests are
input: which study, which sites, which model, how many survivors, all is checked against the study
that this site approved and the roster that it trusts, before anything is charged or trained.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl import secagg
from cloister_fl.client.secure_aggregation.ledger_round_store import RoundMemory
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.last_refusal import keep_last_refusal
from cloister_fl.client.site.trusted_roster import read_pin
from cloister_fl.errors import CloisterError, RosterMismatch, SecureAggregationError, WireInvalid
from cloister_fl.membership.roster import Roster
from cloister_fl.protocol.round_messages import Octets
from cloister_fl.secagg.messages.codec import Bundle, MaskRequest, Message
from cloister_fl.study.schema import Study
from cloister_fl.system import cpu

Update = NDArray[Any]


@dataclass
class _Member:
    """This process's part of one hospital in one study."""

    protocol: secagg.Site
    roster: Roster
    kept: tuple[tuple[str, int, bytes], Update] | None = None
    """The last vector, by run, sum and model, for another attempt at the same sum."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One message at a time: between check and mask nothing of the epoch may change."""


_Key = tuple[Path, str, bytes, secagg.SitePolicy]

_MEMBERS_KEPT = 4
"""Studies of one hospital that may have key epochs alive; the oldest gives way."""

_EPOCHS_A_SUM = 50
"""Key epochs that a sum may take on the average, over all attempts and repetitions of a study."""


class Members:
    """Parts in secure aggregation, of all hospitals and studies of one app."""

    def __init__(self) -> None:
        self._members: dict[_Key, _Member] = {}

    def count(self, site: Site) -> int:
        """How many studies of a site have key epochs here."""
        return sum(key[0] == site.root for key in self._members)

    def forget(self, site: Site) -> None:
        """Give up all key epochs of a site and overwrite their secrets."""
        for key in [key for key in self._members if key[0] == site.root]:
            self._members.pop(key).protocol.close()

    def of(self, site: Site, study: Study, pin: Path) -> _Member:
        """The site's part in a study, made where it is not there.

        Raises:
            RosterInvalid, FileUnreadable: the pin cannot be used.
        """
        roster = read_pin(pin)
        policy = secagg.SitePolicy(
            study=bytes.fromhex(study.digest),
            colluders=study.aggregation.colluders,
            minimum_sites=max(site.policy.min_sites, study.aggregation.min_sites),
        )
        key = (site.root, study.digest, roster.digest, policy)
        if key not in self._members:
            mine = [known for known in self._members if known[0] == site.root]
            for oldest in mine[: max(0, len(mine) + 1 - _MEMBERS_KEPT)]:
                self._members.pop(oldest).protocol.close()
            protocol = secagg.Site(
                identity=site.identity(),
                name=site.name,
                roster=roster,
                policy=policy,
                store=RoundMemory(
                    site.ledger,
                    delta=site.policy.ledger_delta,
                    subject=study.update_digest,
                    most_epochs=_EPOCHS_A_SUM * 2 * (study.training.rounds + 1),
                ),
                gave_up=lambda error: _note(site, error),
            )
            self._members[key] = _Member(protocol, roster)
        return self._members[key]


def require_roster(site: Site, pin: Path, digest: str) -> None:
    """Refuse a run over another roster than the trusted one, or one without this site.

    Raises:
        RosterMismatch: see above.
        RosterInvalid, FileUnreadable: the pin cannot be used.
    """
    roster = read_pin(pin)
    if roster.digest.hex() != digest:
        raise RosterMismatch(
            "The run is for another roster than the trusted one of this site.",
            remedy="Compare the roster with the other sites, then accept it or not: "
            + site.command("roster"),
        )
    if roster.public_key(site.name) != site.identity().public:
        raise RosterMismatch(
            "The trusted roster does not list this site with its own key.",
            remedy="Ask the coordinator to enrol this site's key, then accept that roster: "
            + site.command("roster"),
        )


class Exchange:
    """One message of the server, and this site's answers to its parts.

    Args:
        site: the hospital.
        study: the approved study.
        pin: file of the trusted roster.
        data: a ``Bundle``, encoded.
        members: where the site's part in the study lives.

    Raises:
        WireInvalid: the bytes are no bundle of requests, or ask for two vectors.
        RosterMismatch, RosterInvalid, FileUnreadable: see ``require_roster``.
    """

    def __init__(self, site: Site, study: Study, pin: Path, data: Octets, members: Members) -> None:
        message = secagg.decode(data.tobytes())
        if not isinstance(message, Bundle):
            raise WireInvalid("The message is not a bundle of requests.")
        self._parts = message.parts
        masks = [part for part in self._parts if isinstance(part, MaskRequest)]
        if len(masks) > 1:
            raise WireInvalid("One message requests two vectors.")
        self.mask_request = masks[0] if masks else None
        self._site = site
        self._member = members.of(site, study, pin)
        self._masked: Message | None = None

    @property
    def roster(self) -> Roster:
        """The trusted roster."""
        return self._member.roster

    def answer(
        self,
        expected: secagg.Session,
        produce: Callable[[], Update],
        *,
        run: str,
        saturate: bool,
    ) -> bytes:
        """Check the session, produce and mask the vector, and answer all parts as one bundle.

        Args:
            expected: the session as this site knows it.
            produce: charges and trains; called only once every check has passed, and not again
                for another attempt at the same sum in this process.
            run: the run, which the kept vector belongs to.
            saturate: see ``fixed_point.encode_into``.

        Raises:
            CloisterError: whatever ``produce`` raised; the key epoch is then given up.
        """
        with self._member.lock:
            self._mask(expected, produce, run=run, saturate=saturate)
            return self._answers()

    def answer_without_vector(self) -> bytes:
        """The answers to all parts, none of which asks for a vector."""
        with self._member.lock:
            return self._answers()

    def _mask(
        self,
        expected: secagg.Session,
        produce: Callable[[], Update],
        *,
        run: str,
        saturate: bool,
    ) -> None:
        request = self.mask_request
        assert request is not None
        protocol, kid = self._member.protocol, request.kid
        try:
            protocol.open(request, expected)
            update = self._vector(expected, produce, run, ready=protocol.has_masked(kid))
            self._masked = protocol.mask(kid, update, saturate=saturate, threads=cpu.available())
        except SecureAggregationError as error:
            self._masked = protocol.abort(kid, error)
        except BaseException as error:
            protocol.abort(kid, error if isinstance(error, Exception) else RuntimeError())
            raise

    def _vector(
        self, expected: secagg.Session, produce: Callable[[], Update], run: str, *, ready: bool
    ) -> Update:
        if ready:
            return np.empty(0)  # The masked vector was made; it is given again.
        member, mark = self._member, (run, expected.round, expected.model)
        if member.kept is None or member.kept[0] != mark:
            member.kept = None
            member.kept = (mark, produce())
        return member.kept[1]

    def _answers(self) -> bytes:
        answers = []
        for part in self._parts:
            if isinstance(part, MaskRequest):
                assert self._masked is not None
                answers.append(self._masked)
            else:
                answers.append(self._member.protocol.respond(part))
        return Bundle(tuple(answers)).encode()


def _note(site: Site, error: Exception) -> None:
    if isinstance(error, CloisterError):
        keep_last_refusal(site.root, error)
