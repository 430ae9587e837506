"""The run: prepare the sites, then round after round until the study is done.

What a crash can cost is one round: before a round leaves, ``Checkpoints.mark`` notes it;
after it, the whole state is saved. With privacy on, a round that was sent and not finished is
charged at the sites and is never trained again: a resumed run counts it as lost and goes on
with the next, so no site ever pays more than the study's epsilon.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cloister_common import networks, vectors
from cloister_common.audit import Value
from cloister_common.errors import (
    AuditLogDamaged,
    CloisterError,
    InternalError,
    TooFewSites,
    TooFewSurvivors,
)
from cloister_common.identity import verify
from cloister_common.metrics import Metrics
from cloister_common.privacy.accounting import calibrate, epsilon_pld
from cloister_common.records import (
    Counts,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    Vector,
    signed_answer,
)
from cloister_common.roster import SITE_ID, Roster
from cloister_common.secagg.parameters import Parameters
from cloister_common.study import Study
from cloister_server.checkpoint import Checkpoints, Figures, Progress, RunState
from cloister_server.collection import (
    LATE,
    REASONS,
    Collected,
    Collector,
    Members,
    PlainCollector,
    RoundLost,
    require_sites,
)
from cloister_server.evaluation import figures_of, measure_counts
from cloister_server.mailbox import Mailbox
from cloister_server.masked import MaskedCollector
from cloister_server.optimizers import OptimizerState, step


@dataclass(frozen=True)
class Began:
    """The sites answered; ``refused`` gives the others' reasons."""

    sites: tuple[str, ...]
    refused: Mapping[str, str]
    first_round: int
    rounds: int
    lost: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """A model was made, and measured where it may be."""

    figures: Figures
    rounds: int


@dataclass(frozen=True)
class Lost:
    """A round has no sum and never will; what it cost the sites stays charged."""

    round: int


@dataclass(frozen=True)
class Waiting:
    """Too few sites are here; the run waits for them. ``refused`` gives the others' reasons."""

    present: int
    needed: int
    refused: Mapping[str, str]


Event = Began | Measured | Lost | Waiting


def _ignore(event: Event) -> None:
    del event


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Patience:
    """How a run of real hospitals waits: for people who approve, and for machines that sleep.

    Attributes:
        begin: seconds that a run which could begin waits for sites that have not answered yes.
        soonest: seconds between the first two questions.
        latest: seconds between two questions, at most.
    """

    begin: float = 3600.0
    soonest: float = 2.0
    latest: float = 30.0


@dataclass(frozen=True)
class Hooks:
    """What the caller adds to a run.

    Attributes:
        evaluate: measures a flat model on a hold-out that belongs to no site.
        notify: is told of progress.
        check: is called again and again, and may raise to end the run.
        patience: how to wait where too few sites are here; without it that is an error.
        timeout: seconds after which a stage goes on without those who have not answered; None
            waits for all.
    """

    evaluate: Callable[[Vector], Metrics] | None = None
    notify: Callable[[Event], None] = _ignore
    check: Callable[[], None] = _nothing
    patience: Patience | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished run: the last state, who took part, and who refused and why."""

    state: RunState
    sites: tuple[str, ...]
    refused: Mapping[str, str]


class Run:
    """One run of one study.

    Args:
        mailbox: the federation.
        study: what is trained.
        checkpoints: where the state is kept.
        hooks: evaluation and progress.
        expected: sites that are waited for before the first round.
        roster: the federation's; needed where the study masks its updates.
        signatures: who vouches for the study, see ``signing``.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        study: Study,
        checkpoints: Checkpoints,
        hooks: Hooks,
        *,
        expected: int,
        roster: Roster | None = None,
        signatures: bytes = b"",
    ) -> None:
        self._mailbox = mailbox
        self._study = study
        self._canonical = study.canonical()
        self._checkpoints = checkpoints
        self._hooks = hooks
        self._expected = expected
        self._roster = roster
        self._signatures = signatures
        self._progress = Progress()
        self._sent: Mapping[str, int] = {}
        self._nodes: dict[int, str] = {}
        self._refused: dict[str, str] = {}
        self._invited = 0
        self._run = ""

    def execute(self, *, resume: bool) -> Outcome:
        """Run to the end and return the outcome.

        Raises:
            TooFewSites: fewer sites than the study's minimum take part.
            NothingToResume, ResumeMismatch: see ``Checkpoints.load``.
        """
        try:
            outcome = self._execute(resume=resume)
        except AuditLogDamaged:
            raise
        except CloisterError as error:
            if self._run:
                self._note("ended", how=error.code, refused=self._told_refused())
            raise
        state = outcome.state
        self._note("ended", how="done", rounds=state.completed, refused=self._told_refused())
        return outcome

    def _execute(self, *, resume: bool) -> Outcome:
        began = time.monotonic()
        if resume:
            state, self._progress = self._checkpoints.load(self._study)
            state, first = self._after_crash(state, self._progress)
        else:
            state, first = self._fresh(), 1
        before, self._sent = state.seconds, state.sent
        self._run = state.run
        state = self._prepare(state)
        collector = self._collector(state)
        self._checkpoints.save(self._study, state)
        seats = " ".join(f"{node}={site}" for node, site in sorted(self._nodes.items()))
        self._note(
            "began",
            study=self._study.digest,
            sites=seats,
            first=first,
            rounds=self._study.training.rounds,
            refused=self._told_refused(),
        )
        rounds = self._study.training.rounds
        self._hooks.notify(
            Began(
                tuple(sorted(self._nodes.values())), dict(self._refused), first, rounds, state.lost
            )
        )
        if not state.figures:
            # Measured here and not when it is drawn: the sites measure it where privacy is off.
            none = Figures(0, 0, 0.0, 0.0)
            state = replace(state, figures=(self._measure(collector, state, 0, none),))
        self._checkpoints.save(self._study, state)
        for number in range(first, rounds + 1):
            self._hooks.check()
            state = self._round(collector, number, state)
            seconds = before + time.monotonic() - began
            state = replace(state, seconds=seconds, sent=self._sent_by_site())
            self._checkpoints.save(self._study, state)
        return Outcome(state, tuple(sorted(self._nodes.values())), dict(self._refused))

    def _note(self, kind: str, **body: Value) -> None:
        self._mailbox.note(kind, run=self._run, **body)

    def _told_refused(self) -> str:
        """Who refused and why, for the log: reasons of the closed list only."""
        known = {
            name: reason if reason in REASONS else Refused.DECLINED.value
            for name, reason in self._refused.items()
        }
        return "; ".join(f"{name}={reason}" for name, reason in sorted(known.items()))

    def _fresh(self) -> RunState:
        study = self._study
        module = networks.build(
            study.network, outputs=study.outputs, size=study.input.size, seed=study.training.seed
        )
        model = vectors.flatten(module)
        optimizer = OptimizerState.fresh(model.size, study.aggregation)
        return RunState(secrets.token_hex(16), 0, model, optimizer)

    def _after_crash(self, state: RunState, progress: Progress) -> tuple[RunState, int]:
        sent = progress.round
        if sent <= state.completed or not self._study.privacy.enabled:
            return state, state.completed + 1
        started = dict(state.started)
        for name in progress.sites:
            started[name] = started.get(name, 0) + 1
        return replace(state, lost=(*state.lost, sent), started=started, completed=sent), sent + 1

    def _prepare(self, state: RunState) -> RunState:
        patience = self._hooks.patience
        asked = self._study.aggregation
        needed = asked.min_sites
        if asked.secure and state.invited:
            needed = Parameters.derive(len(state.invited), asked.colluders).m
        if patience is None:
            self._ask(self._mailbox.wait_for_nodes(self._expected), state)
            require_sites(needed, len(self._nodes), self._invited, self._refused)
        else:
            self._await(patience, state, needed, all_of=patience.begin)
        # Whom a run invited stays as it was: two sums over other sites could be compared.
        return replace(state, invited=state.invited or tuple(sorted(self._nodes.values())))

    def _ask(self, nodes: Collection[int], state: RunState) -> int:
        """Ask nodes whether they take part; how many of them do. Asking again changes nothing."""
        roster = self._roster.digest.hex() if self._roster is not None else ""
        self._invited = max(self._expected, len(nodes), self._invited)
        task = Prepare(self._canonical, state.run, self._invited, roster, self._signatures)
        agreed = 0
        for reply in self._mailbox.ask(nodes, task, Prepared):
            message = reply.message
            known = self._nodes.get(reply.node)
            if not self._is_signed(message, reply.node, state.run):
                self._refused[known or f"node {reply.node}"] = (
                    message.reason if isinstance(message, Refusal) else Refused.MESSAGE.value
                )
            elif isinstance(message, Refusal):
                self._refused[message.site or f"node {reply.node}"] = message.reason
            elif message.site in self._nodes.values() and message.site != known:
                self._refused[f"{message.site} (second node)"] = Refused.MESSAGE.value
            elif state.invited and message.site not in state.invited:
                self._refused[message.site] = LATE
            else:
                self._nodes[reply.node] = message.site
                self._refused.pop(message.site, None)
                self._refused.pop(f"node {reply.node}", None)
                agreed += 1
        return agreed

    def _await(
        self, patience: Patience, state: RunState, needed: int, *, all_of: float = 0.0
    ) -> None:
        """Wait until enough sites say yes; for ``all_of`` seconds more, until all of them do."""
        pause, told, enough_since = patience.soonest, "", 0.0
        agreed: set[int] = set()
        online: set[int] = set()
        while True:
            self._hooks.check()
            before, online = online, set(self._mailbox.nodes())
            if online - before:
                pause = patience.soonest
            agreed &= online
            for node in online - agreed:
                if self._ask([node], state):
                    agreed.add(node)
            everyone = len(state.invited) or self._expected
            if len(agreed) >= needed:
                enough_since = enough_since or time.monotonic()
                if len(agreed) >= everyone or time.monotonic() - enough_since >= all_of:
                    return
            waiting = Waiting(len(agreed), needed, dict(self._refused))
            if repr(waiting) != told:
                told = repr(waiting)
                self._hooks.notify(waiting)
            time.sleep(pause)
            pause = min(patience.latest, 1.5 * pause)

    def _is_signed(self, message: Prepared | Refusal, node: int, run: str) -> bool:
        """Whether the site itself said so; without a roster nobody's key is known.

        Even then a site's name is one: it goes into the log and the report.
        """
        if self._roster is None:
            nameless = isinstance(message, Refusal) and not message.site
            return nameless or SITE_ID.fullmatch(message.site) is not None
        word = message.reason if isinstance(message, Refusal) else f"{run} {self._study.digest}"
        public = self._roster.public_key(message.site)
        said = signed_answer(message.site, node, word)
        return public is not None and verify(public, message.signature, *said)

    def _collector(self, state: RunState) -> Collector:
        members = Members(state.run, self._nodes, self._invited, state.invited)
        if not self._study.aggregation.secure:
            return PlainCollector(self._mailbox, self._study, members)
        if self._roster is None:
            raise InternalError("A run that masks its updates was started without a roster.")
        return MaskedCollector(
            self._mailbox,
            self._study,
            members,
            self._roster,
            answered=self._progress.answered,
            asking=self._asking,
        )

    def _asking(self, number: int, survivors: tuple[str, ...]) -> None:
        answered = {**self._progress.answered, number: survivors}
        self._progress = replace(self._progress, answered=answered)
        self._checkpoints.mark(self._progress)

    def _round(self, collector: Collector, number: int, state: RunState) -> RunState:
        study = self._study
        began = time.monotonic()
        names = tuple(sorted(self._nodes.values()))
        # What an interrupted attempt at this very round was answered for still binds it.
        answered = self._progress.answered if self._progress.round == number else {}
        self._progress = Progress(number, names, answered)
        self._checkpoints.mark(self._progress)
        started = {name: state.started.get(name, 0) + 1 for name in names}
        state = replace(state, started={**state.started, **started})
        try:
            collected = self._collect(collector, number, state)
        except RoundLost as lost:
            self._refused.update(lost.refused)
            self._note("lost", round=number)
            self._hooks.notify(Lost(number))
            return replace(state, completed=number, lost=(*state.lost, number))
        self._refused.update(collected.refused)
        for name in collected.sites:
            self._refused.pop(name, None)
        self._note("summed", round=number, sites=" ".join(collected.sites))
        model, optimizer = step(state.model, collected.mean, state.optimizer, study.aggregation)
        state = replace(state, completed=number, model=model, optimizer=optimizer)
        figures = Figures(
            round=number,
            sites=len(collected.sites),
            seconds=time.monotonic() - began,
            update_norm=float(np.linalg.norm(collected.mean.astype(np.float64))),
            epsilon=study_epsilon(study, max(state.started.values())),
        )
        measured = self._measure(collector, state, number, figures)
        return replace(state, figures=(*state.figures, measured))

    def _collect(self, collector: Collector, number: int, state: RunState) -> Collected:
        """A round's update; with patience, once enough sites are here.

        A site keeps what it trained for another attempt at the same sum, and is not charged for
        it. Where that does not help, the round is lost, and the next one begins.
        """
        patience = self._hooks.patience
        if patience is None:
            return collector.updates(number, state.model)
        asked = self._study.aggregation
        needed = asked.min_sites
        if asked.secure:
            needed = Parameters.derive(len(state.invited), asked.colluders).m
        for _ in range(2):
            try:
                return collector.updates(number, state.model)
            except (TooFewSites, TooFewSurvivors):
                self._await(patience, state, needed)
        raise RoundLost(dict(self._refused))

    def _sent_by_site(self) -> dict[str, int]:
        received = self._mailbox.received
        now = {site: received.get(node, 0) for node, site in self._nodes.items()}
        return {site: self._sent.get(site, 0) + now.get(site, 0) for site in {*self._sent, *now}}

    def _measure(
        self, collector: Collector, state: RunState, number: int, figures: Figures
    ) -> Figures:
        due = number % self._study.evaluation.every == 0 or number == self._study.training.rounds
        if due and self._hooks.evaluate is not None:
            figures = figures_of(figures, self._hooks.evaluate(state.model))
        elif due and not self._study.privacy.enabled and self._study.evaluation.site_fraction:
            counts = self._histogram(collector, number, state.model)
            if counts is not None:
                figures = figures_of(figures, measure_counts(counts))
        self._hooks.notify(Measured(figures, self._study.training.rounds))
        return figures

    def _histogram(self, collector: Collector, number: int, model: Vector) -> Counts | None:
        try:
            return collector.histogram(number, model)
        except (TooFewSites, TooFewSurvivors):
            if self._hooks.patience is None:
                raise
            # The round has its model; that it was not measured is no reason to train it again.
            return None


def study_epsilon(study: Study, rounds: int) -> float | None:
    """Epsilon at the study's delta after ``rounds`` rounds; None where privacy is off.

    A public function of the study's constants: it tells nothing of a site's data or ledger.
    """
    if not study.privacy.enabled:
        return None
    training, privacy = study.training, study.privacy
    noise = calibrate(privacy.epsilon, privacy.delta, training.sampling_rate, training.total_steps)
    steps = rounds * training.steps_per_round
    if steps == 0:
        return 0.0
    return epsilon_pld(noise, training.sampling_rate, steps, privacy.delta)
