"""Collection with secure aggregation (``secagg/v2``): the server reads sums only.

Two round trips a sum once the keys are there: the keys of the next epoch ride with the masked
vectors of this one, and its boxes with the shares. A sum that cannot be saved is tried again
under a new attempt number in a new key epoch; once any site may have answered for a set of
survivors, only that set is tried.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from cloister_fl import secagg
from cloister_fl.errors import (
    CloisterError,
    SecureAggregationError,
    SessionMismatch,
    SiteAborted,
    TooFewSurvivors,
)
from cloister_fl.membership.roster import Roster
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    EvaluateTask,
    Exchange,
    Exchanged,
    Octets,
    Refusal,
    Refused,
    RoundMessage,
    TrainTask,
    Vector,
    octets,
)
from cloister_fl.secagg.messages.codec import Abort, Bundle, Masked, MaskRequest, Message
from cloister_fl.secagg.reply_dispatch import author, belongs, receive, require_answers
from cloister_fl.server.rounds.collector import (
    Collected,
    Histograms,
    Members,
    RoundLost,
    in_words,
    require_sites,
)
from cloister_fl.server.rounds.messenger import UNREADABLE, Messenger
from cloister_fl.study.schema import Study
from cloister_fl.system import cpu

ATTEMPTS = 3

Survivors = tuple[str, ...]


@dataclass(frozen=True)
class _Sum:
    """One sum that is wanted: its constants, by attempt, and the message that asks for it."""

    number: int
    session: Callable[[int], secagg.Session]
    task: Callable[[Octets], RoundMessage]
    last: bool
    """Whether no other sum follows, so that no keys need to be sent ahead."""
    keep: Callable[[int, secagg.SumRecord], None] | None = None
    """Where the record of the sum goes, if it is kept."""


class SecureCollector:
    """Collects sums under secure aggregation, see ``Collector``.

    Args:
        messenger: the federation.
        study: what is trained.
        members: who takes part.
        roster: the federation's roster.
        answered: survivors that a round before a crash was answered for, by number of the sum.
        asking: is told, durably, for which survivors a sum is about to be unmasked.
        keep: is given each round's number and the record of its sum; None where none is kept.

    Raises:
        ParameterRefused: too few sites for the study's ``colluders``.
        RosterMismatch: an invited site is not on the roster.
    """

    def __init__(
        self,
        messenger: Messenger,
        study: Study,
        members: Members,
        roster: Roster,
        *,
        answered: Mapping[int, Survivors] | None = None,
        asking: Callable[[int, Survivors], None] | None = None,
        keep: Callable[[int, secagg.SumRecord], None] | None = None,
    ) -> None:
        self._messenger = messenger
        self._study = study
        self._canonical = study.canonical()
        self._members = members
        self._roster = roster
        self._answered = dict(answered or {})
        self._asking = asking
        self._keep = keep
        # A resumed run must not claim an epoch of the process before it.
        self._run = f"{members.run}/{secrets.token_hex(8)}"
        self._epochs = 0
        self._ready: secagg.ServerEpoch | None = None
        self._blamed: set[str] = set()
        # Of one sum: whose last answer was a refusal, and who did not publish what somebody lacks.
        self.refused: dict[str, str] = {}
        self._away: set[str] = set()
        self._sitting_out: set[str] = set()
        self._terms(0)

    def updates(self, number: int, model: Vector) -> Collected:
        """See ``Collector``."""
        study, members = self._study, self._members

        def session(attempt: int) -> secagg.Session:
            return sessions.update_session(
                study,
                members.invited,
                round_number=number,
                attempt=attempt,
                model=model,
            )

        def task(exchange: Octets) -> RoundMessage:
            return TrainTask(self._canonical, members.run, number, members.asked, exchange, model)

        private, releases = study.privacy.enabled, study.releases
        last = number == study.training.rounds and private and not releases
        aggregate = self._sum(_Sum(number, session, task, last, self._keep))
        return Collected(aggregate.mean(), aggregate.survivors, dict(self.refused))

    def histogram(self, number: int, model: Vector) -> Histograms | None:
        """See ``Collector``."""
        study, members = self._study, self._members

        def session(attempt: int) -> secagg.Session:
            return sessions.histogram_session(
                study, members.invited, round_number=number, attempt=attempt, model=model
            )

        def task(exchange: Octets) -> RoundMessage:
            return EvaluateTask(
                self._canonical, members.run, number, members.asked, exchange, model
            )

        last = number == study.training.rounds
        try:
            aggregate = self._sum(_Sum(number, session, task, last))
        except RoundLost:
            return None
        counts = np.rint(aggregate.sum()).astype(np.int64)
        total = counts.reshape(sessions.counts_shape(study))
        return Histograms(total, len(aggregate.survivors))

    def _sum(self, wanted: _Sum) -> secagg.Aggregate:
        self.refused = dict.fromkeys(self._blamed, Refused.PROTOCOL.value)
        self._away, self._sitting_out = set(), set()
        last: SecureAggregationError | None = None
        for attempt in range(ATTEMPTS):
            session = wanted.session(attempt)
            if self._blamed & set(self._answered.get(session.round, ())):
                break
            try:
                aggregate = self._attempt(wanted, session)
                for name in aggregate.survivors:
                    self.refused.pop(name, None)
                return aggregate
            except SecureAggregationError as error:
                last = error
                self._blame(error)
        raise self._given_up(last)

    def _given_up(self, last: SecureAggregationError | None) -> Exception:
        """Return the error of a failed sum: the run may continue where enough sites are left."""
        needed = self._terms(0).parameters.m
        gone = self._away | self._blamed
        present = len(set(self._members.nodes.values()) - gone)
        require_sites(needed, present, self._members.asked, self.refused)
        if self._blamed:
            return RoundLost(dict(self.refused))
        if last is None:
            return RoundLost(dict(self.refused))
        last.why = last.why or in_words(self.refused)
        return last

    def _attempt(self, wanted: _Sum, session: secagg.Session) -> secagg.Aggregate:
        only = self._answered.get(session.round)
        epoch, self._ready = self._ready or self._keyed(wanted, only or ()), None
        masking = epoch.start(session, only=only)
        following = None if wanted.last else self._new_epoch()
        self._ask_for_vectors(wanted, epoch, masking, following)
        self._settle_complaints(wanted, epoch)
        consistency = epoch.close_vectors()
        if consistency is not None:
            self._exchange(wanted, dict.fromkeys(epoch.survivors, (consistency,)), epoch)
        unmask = epoch.unmask_request()
        self._answered[session.round] = epoch.survivors
        if self._asking is not None:
            self._asking(session.round, epoch.survivors)
        requests: dict[str, tuple[Message, ...]] = dict.fromkeys(epoch.survivors, (unmask,))
        share, holders = _share_request(following)
        for name in holders:
            requests[name] = (*requests.get(name, ()), share) if share else requests[name]
        self._exchange(wanted, requests, epoch, following if share else None)
        self._ready = following if share else None
        aggregate = epoch.finish()
        if wanted.keep is not None:
            wanted.keep(wanted.number, secagg.SumRecord.of(epoch, session))
        return aggregate

    def _ask_for_vectors(
        self,
        wanted: _Sum,
        epoch: secagg.ServerEpoch,
        masking: Collection[str],
        following: secagg.ServerEpoch | None,
    ) -> None:
        advertise = (following.advertise_request(),) if following is not None else ()
        requests: dict[str, tuple[Message, ...]] = {}
        for name in self._present():
            if name in masking:
                requests[name] = (epoch.mask_request(name), *advertise)
            elif advertise:
                requests[name] = advertise
        self._exchange(wanted, requests, epoch, following)

    def _settle_complaints(self, wanted: _Sum, epoch: secagg.ServerEpoch) -> None:
        """Where boxes do not open: have their dealers publish the shares, or go on without them.

        A dealer of whom more sites complain than may lie is excluded. One that is silent may be a
        dropout that somebody accuses without a ground, so it sits out this sum alone; and the sum
        begins anew without it, or a site whose box does not open would be left out of each.

        Raises:
            TooFewSurvivors: shares were not published.
        """
        if not epoch.unanswered:
            return
        requests = epoch.disclosure_requests()
        self._exchange(wanted, {name: (one,) for name, one in requests.items()}, epoch)
        for dealer in epoch.overaccused:
            self._exclude(dealer)
        if epoch.unanswered:
            for dealer in epoch.unanswered:
                self._sitting_out.add(dealer)
                self.refused.setdefault(dealer, Refused.PROTOCOL.value)
            raise TooFewSurvivors("A site did not publish shares that others lack.")
        self._ask_for_vectors(wanted, epoch, epoch.accusers, None)

    def _keyed(self, wanted: _Sum, needed: Survivors) -> secagg.ServerEpoch:
        """Set up a new key epoch in two round trips: at the start, and after a failure.

        Those of whom the sum is ``needed`` are asked, come what may: there is no other sum.
        """
        epoch = self._new_epoch()
        advertise = epoch.advertise_request()
        away = self._sitting_out - set(needed)
        present = [name for name in self._present() if name not in away]
        self._exchange(wanted, dict.fromkeys(present, (advertise,)), epoch)
        share = epoch.share_request()
        self._exchange(wanted, dict.fromkeys((r.site for r in share.records), (share,)), epoch)
        return epoch

    def _new_epoch(self) -> secagg.ServerEpoch:
        self._epochs += 1
        terms, keep = self._terms(self._epochs), self._keep is not None
        return secagg.ServerEpoch(terms, self._roster, threads=cpu.available(), keep=keep)

    def _terms(self, epoch: int) -> secagg.EpochTerms:
        return secagg.EpochTerms(
            federation=self._roster.federation,
            study=bytes.fromhex(self._study.digest),
            roster=self._roster.digest,
            run=self._run,
            epoch=epoch,
            invited=self._members.invited,
            colluders=self._study.aggregation.colluders,
        )

    def _present(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._members.nodes.values()) - self._blamed))

    def _exchange(
        self,
        wanted: _Sum,
        requests: Mapping[str, tuple[Message, ...]],
        *epochs: secagg.ServerEpoch | None,
    ) -> None:
        """Send each site its requests; take what answers them."""
        nodes = {site: node for node, site in self._members.nodes.items()}
        tasks = {
            nodes[name]: self._task(wanted, parts)
            for name, parts in requests.items()
            if name in nodes
        }
        for reply in self._messenger.stream(tasks, Exchanged):
            name = self._members.nodes[reply.node]
            if isinstance(reply.message, Refusal):
                self._refuse(name, reply.message.reason)
                continue
            try:
                known = [epoch for epoch in epochs if epoch is not None]
                self._take(name, reply.message, requests[name], known)
            except CloisterError as error:
                self._refuse(name, Refused.PROTOCOL.value)
                self._blame(error)
            except Exception:
                # Whatever a library makes of what a site sent costs that site its place, and no
                # other the round.
                self._refuse(name, UNREADABLE)

    def _task(self, wanted: _Sum, parts: tuple[Message, ...]) -> RoundMessage:
        members, data = self._members, octets(Bundle(parts).encode())
        if any(isinstance(part, MaskRequest) for part in parts):
            return wanted.task(data)
        return Exchange(self._canonical, members.run, wanted.number, members.asked, data)

    def _take(
        self,
        name: str,
        message: Exchanged,
        requests: tuple[Message, ...],
        epochs: Collection[secagg.ServerEpoch],
    ) -> None:
        bundle = secagg.decode(message.exchange.data)
        if message.site != name or not isinstance(bundle, Bundle):
            raise SessionMismatch(f"{name} sent another message than was requested.")
        # First: what is left out would otherwise go unnoticed, and its site unnamed.
        require_answers(name, requests, bundle.parts)
        given_up: Refused | None = None
        for part in bundle.parts:
            epoch = next((epoch for epoch in epochs if belongs(part, epoch)), None)
            if epoch is None or author(part) != name:
                raise SessionMismatch(f"{name} sent a message of another epoch or of another site.")
            receive(part, epoch)
            if isinstance(part, Abort):
                # A training that diverged is no failed check: what failed is told at the site.
                is_own = part.code == SiteAborted.code
                given_up = Refused.DECLINED if is_own else Refused.PROTOCOL
        if given_up is not None:
            self._refuse(name, given_up.value)
            return
        self._away.discard(name)
        if any(isinstance(part, Masked) for part in bundle.parts):
            # It is in this attempt, whatever it missed before; any other answer excuses nothing.
            self.refused.pop(name, None)

    def _refuse(self, name: str, reason: str) -> None:
        self.refused[name] = reason
        self._away.add(name)

    def _blame(self, error: CloisterError) -> None:
        """Exclude the sites that an error blames."""
        if isinstance(error, SecureAggregationError):
            for name in error.blamed_sites:
                self._exclude(name)

    def _exclude(self, name: str) -> None:
        """Ask a site for nothing more in this run."""
        self._blamed.add(name)
        self.refused[name] = Refused.PROTOCOL.value


def _share_request(
    following: secagg.ServerEpoch | None,
) -> tuple[Message | None, tuple[str, ...]]:
    if following is None:
        return None, ()
    try:
        request = following.share_request()
    except TooFewSurvivors:
        return None, ()
    return request, tuple(record.site for record in request.records)
