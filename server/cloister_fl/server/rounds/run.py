"""The run: prepare the sites, then round after round until the study is done.

What a crash can cost is one round: before a round leaves, ``Checkpoints.mark`` notes it;
after it, the whole state is saved. With privacy on, a round that was sent and not finished is
charged at the sites and is never trained again: a resumed run counts it as lost and goes on
with the next, so no site ever pays more than the study's epsilon. Where the state is an older copy,
more than one round is lost, and all of them count.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cloister_fl.audit_log import Value
from cloister_fl.errors import (
    AuditLogDamaged,
    CloisterError,
    InternalError,
    NothingToResume,
    RunStopped,
    SecureAggregationError,
    TooFewSites,
    TooFewSurvivors,
    UpdateReuse,
)
from cloister_fl.membership.roster import Roster
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import Counts, Finish, Finished, Vector
from cloister_fl.server.rounds.checkpoint import (
    ENDED_KEPT,
    ENDED_STALLED,
    Checkpoints,
    Figures,
    Progress,
    Released,
    RunState,
)
from cloister_fl.server.rounds.collector import (
    Collected,
    Collector,
    Histograms,
    Members,
    PlainCollector,
    RoundLost,
    reply_bytes,
)
from cloister_fl.server.rounds.events import (
    Began,
    Hooks,
    KeepWhatIsThere,
    Lost,
    Measured,
    ReleaseMade,
)
from cloister_fl.server.rounds.kept_sums import KEPT, why_not
from cloister_fl.server.rounds.messenger import Messenger
from cloister_fl.server.rounds.model_choice import (
    chosen,
    delivered,
    is_stalled,
    require_who_chooses,
)
from cloister_fl.server.rounds.participants import Participants
from cloister_fl.server.rounds.secure_collector import SecureCollector
from cloister_fl.server.rounds.strategies import OptimizerState, averaged, step
from cloister_fl.server.rounds.sum_check import is_possible, norm_of, require_one_of_two
from cloister_fl.study import initial_model, study_network
from cloister_fl.study.cost import UNITS, open_units, release_mechanism, sensitivity, study_epsilon
from cloister_fl.study.schema import Aggregation, Study


@dataclass(frozen=True)
class Outcome:
    """A finished run: the last state, who took part, who refused and why, whether sums are kept."""

    state: RunState
    sites: tuple[str, ...]
    refused: Mapping[str, str]
    sums: str = ""


class Run:
    """One run of one study.

    Args:
        messenger: sends messages to the federation.
        study: what is trained.
        checkpoints: where the state is kept.
        hooks: evaluation and progress.
        expected: sites that are waited for before the first round.
        roster: the federation's; needed with secure aggregation.
        signatures: who vouches for the study, see ``study.signatures``.
    """

    def __init__(
        self,
        messenger: Messenger,
        study: Study,
        checkpoints: Checkpoints,
        hooks: Hooks,
        *,
        expected: int,
        roster: Roster | None = None,
        signatures: bytes = b"",
    ) -> None:
        self._messenger = messenger
        self._study = study
        self._canonical = study.canonical()
        self._checkpoints = checkpoints
        self._hooks = hooks
        self._roster = roster
        self._expected = expected
        self._participants = Participants(
            messenger, study, hooks, expected=expected, roster=roster, signatures=signatures
        )
        self._progress = Progress()
        self._sent: Mapping[str, int] = {}
        self._run = ""
        self._sums = ""
        self._saved: RunState | None = None

    def execute(self, *, resume: bool) -> Outcome:
        """Run to the end and return the outcome.

        Raises:
            TooFewSites: fewer sites than the study's minimum take part.
            OptionInvalid: the study stops by a hold-out, and there is none that can choose.
            SumOutsideBound: two sums in a row are none that honest sites can give.
            InitialModelUnfit: the model that is drawn here is not the one that the study states.
            NothingToResume, ResumeMismatch: see ``Checkpoints.load``.
        """
        try:
            outcome = self._execute(resume=resume)
        except AuditLogDamaged:
            raise
        except CloisterError as error:
            if self._run:
                self._note("ended", how=error.code, refused=self._participants.told_refused())
            raise
        refused = self._participants.told_refused()
        self._note("ended", how="done", rounds=outcome.state.completed, refused=refused)
        return outcome

    def _execute(self, *, resume: bool) -> Outcome:
        require_who_chooses(self._study, self._hooks.holdout)
        began = time.monotonic()
        if resume:
            state, self._progress = self._checkpoints.load(self._study)
            self._require_fit(state)
            state, first = self._after_crash(state, self._progress)
        else:
            state, first = self._fresh(), 1
        before, self._sent = state.seconds, state.sent
        self._run = state.run
        sites = max(self._expected, len(state.invited))
        self._messenger.bound_replies(reply_bytes(self._study, state.model.size, sites))

        def keep(state: RunState) -> RunState:
            seconds = before + time.monotonic() - began
            state = replace(state, seconds=seconds, sent=self._sent_by_site())
            self._save(state)
            return state

        try:
            state = replace(state, invited=self._participants.begin(state.run, state.invited))
            self._sums = self._keep_sums(state, resume=resume)
            collector = self._collector(state)
            state = self._begun(state, collector, first)
            for number in range(first, self._study.training.rounds + 1):
                if state.ended:
                    break
                self._hooks.check()
                state = keep(self._round(collector, number, state))
                require_one_of_two(state)
            state = keep(self._last_measured(state))
            if self._study.releases and state.release is None and state.ended != ENDED_KEPT:
                state = keep(self._release(collector, state))
        except KeepWhatIsThere:
            # The last that was saved: a noised evaluation that was asked for is charged.
            state = keep(self._last_measured(self._kept(self._saved or state)))
        if state.ended and self._study.privacy.enabled:
            # Who takes part is not known where the run ended before it was asked again.
            nodes = self._participants.nodes or self._messenger.nodes()
            self._messenger.ask(nodes, Finish(self._study.digest, state.run), Finished)
        refused = dict(self._participants.refused)
        return Outcome(state, self._participants.sites, refused, self._sums)

    def _begun(self, state: RunState, collector: Collector, first: int) -> RunState:
        """Tell that the run has begun, and measure the initial model."""
        rounds = self._study.training.rounds
        self._save(state)
        self._note(
            "began",
            study=self._study.digest,
            sites=self._participants.seats(),
            first=first,
            rounds=rounds,
            refused=self._participants.told_refused(),
            sums=self._sums,
        )
        self._hooks.notify(
            Began(
                self._participants.sites,
                dict(self._participants.refused),
                rounds,
                state.lost,
                update_bytes=state.model.nbytes,
            )
        )
        if not state.figures:
            # Measured here and not when it is drawn: the sites measure it where privacy is off.
            none = Figures(0, 0, 0.0, 0.0)
            state = replace(state, figures=(self._measure(collector, state, 0, none),))
        self._save(state)
        return state

    def _kept(self, state: RunState) -> RunState:
        """The state that a person ends a run with; the round under way was charged, and is lost.

        Raises:
            RunStopped: no round gave a model.
        """
        if not state.figures or state.figures[-1].round == 0:
            raise RunStopped(
                "The run was stopped before a round gave a model, so there is nothing to keep.",
                remedy="Resume it, or leave it: cloister server status",
            )
        return replace(self._after_crash(state, self._progress)[0], ended=ENDED_KEPT)

    def _save(self, state: RunState) -> None:
        self._checkpoints.save(self._study, state)
        self._saved = state
        self._hooks.saved(state)

    def _note(self, kind: str, **body: Value) -> None:
        self._messenger.note(kind, run=self._run, **body)

    def _fresh(self) -> RunState:
        study = self._study
        model = self._drawn()
        # No site would train another, and each would say so for itself.
        initial_model.require_initial(study, initial_model.digest_of(model))
        optimizer = OptimizerState.fresh(model.size, study.aggregation)
        return RunState(secrets.token_hex(16), 0, model, optimizer)

    def _drawn(self) -> Vector:
        """The initial model, from the study's seed."""
        return flat_parameters.flatten(study_network.build_for(self._study))

    def _require_fit(self, state: RunState) -> None:
        """Refuse the model of a checkpoint that is of another length than the study's network."""
        if state.model.size != self._drawn().size:
            raise NothingToResume(
                "The checkpoint's model does not fit the study's network.",
                remedy="Start a new run in an empty folder, without --resume.",
            )

    def _after_crash(self, state: RunState, progress: Progress) -> tuple[RunState, int]:
        if progress.round <= state.completed or not self._study.privacy.enabled:
            return state, state.completed + 1
        lost = tuple(range(state.completed + 1, progress.round + 1))
        started = dict(state.started)
        for number in lost:
            # To whom a round before the last was sent, only the state that is lost knew.
            is_last = number == progress.round
            for name in progress.sites if is_last else {*state.invited, *progress.sites}:
                started[name] = started.get(name, 0) + 1
        state = replace(state, lost=(*state.lost, *lost), started=started, completed=lost[-1])
        return state, state.completed + 1

    def _keep_sums(self, state: RunState, *, resume: bool) -> str:
        """Decide whether the sums are kept, and say so: ``KEPT``, or why not."""
        study, sums, roster = self._study, self._checkpoints.sums, self._roster
        why = why_not(study, len(state.invited), state.model.size)
        if why or roster is None:
            return f"not kept: {why}"
        if resume and not sums.exists():
            return "not kept: the sums of the rounds before are not there"
        if not resume:
            sums.begin(state.model)
        sums.go_on(roster, state.summed)
        return KEPT

    def _collector(self, state: RunState) -> Collector:
        members = Members(
            state.run, self._participants.nodes, self._participants.asked, state.invited
        )
        if not self._study.aggregation.secure:
            return PlainCollector(self._messenger, self._study, members)
        if self._roster is None:
            raise InternalError("A run with secure aggregation was started without a roster.")
        return SecureCollector(
            self._messenger,
            self._study,
            members,
            self._roster,
            answered=self._progress.answered,
            asking=self._asking,
            keep=self._checkpoints.sums.keep if self._sums == KEPT else None,
        )

    def _asking(self, number: int, survivors: tuple[str, ...]) -> None:
        answered = {**self._progress.answered, number: survivors}
        self._progress = replace(self._progress, answered=answered)
        self._checkpoints.mark(self._progress)

    def _round(self, collector: Collector, number: int, state: RunState) -> RunState:
        study = self._study
        began = time.monotonic()
        names = self._participants.sites
        # What an interrupted attempt at this very round was answered for still binds it.
        answered = self._progress.answered if self._progress.round == number else {}
        self._progress = Progress(number, names, answered)
        self._checkpoints.mark(self._progress)
        started = {name: state.started.get(name, 0) + 1 for name in names}
        state = replace(state, started={**state.started, **started})
        try:
            collected = self._collect(collector, number, state)
        except RoundLost as error:
            self._participants.refused.update(error.refused)
            self._note("lost", round=number)
            self._hooks.notify(Lost(number))
            self._require_no_second_sum(number)
            return replace(state, completed=number, lost=(*state.lost, number))
        self._participants.refused.update(collected.refused)
        for name in collected.sites:
            self._participants.refused.pop(name, None)
        norm = norm_of(collected.mean)
        if not is_possible(study, number, state.model, collected, norm):
            self._note("discarded", round=number, sites=" ".join(collected.sites))
            self._hooks.notify(Lost(number, is_discarded=True))
            discarded, lost = (*state.discarded, number), (*state.lost, number)
            return replace(state, completed=number, lost=lost, discarded=discarded)
        self._note("summed", round=number, sites=" ".join(collected.sites))
        state = advanced(state, number, collected.mean, study.aggregation)
        figures = Figures(
            round=number,
            sites=len(collected.sites),
            seconds=time.monotonic() - began,
            update_norm=norm,
            epsilon=study_epsilon(study, max(state.started.values())),
        )
        measured = self._measure(collector, state, number, figures)
        state = chosen(study, replace(state, figures=(*state.figures, measured)))
        return replace(state, ended=ENDED_STALLED) if is_stalled(study, state) else state

    def _last_measured(self, state: RunState) -> RunState:
        """Measure the last model where its round was not due to: the run ended before its last."""
        last, holdout = state.figures[-1], self._hooks.holdout
        if last.metrics is not None or holdout is None:
            return state
        found = holdout.measure(state.released)
        last = replace(last, metrics=found.reported, selecting=found.selecting)
        return chosen(self._study, replace(state, figures=(*state.figures[:-1], last)))

    def _require_no_second_sum(self, number: int) -> None:
        """End a run without privacy where the next round would sum the same model's updates again.

        Sites may have given shares for some survivors of the lost round. The next begins with the
        same model; a sum over other sites would differ from that one by single hospitals' updates.
        With privacy on, each round draws noise of its own.
        """
        if self._study.privacy.enabled:
            return
        asked = self._progress.answered.get(sessions.SUMS_A_ROUND * number)
        if asked:
            raise UpdateReuse(
                f"Round {number} has no sum, and was asked for {', '.join(asked)} already.",
                why="Without privacy no second set of sites is asked for updates of one model: "
                "the two sums would differ by single hospitals.",
                remedy="When all of them are back, resume the run: cloister server resume RUN",
            )

    def _collect(self, collector: Collector, number: int, state: RunState) -> Collected:
        """A round's update; with patience, once enough sites are here.

        A site keeps what it trained for another attempt at the same sum, and is not charged for
        it. Where that does not help, the round is lost, and the next one begins.
        """
        patience = self._hooks.patience
        if patience is None:
            return collector.updates(number, state.model)
        missing: dict[str, str] = {}
        for _ in range(2):
            try:
                return collector.updates(number, state.model)
            except (TooFewSites, TooFewSurvivors):
                # By then all may say yes again: who failed here is named all the same.
                missing = dict(collector.refused)
                self._participants.again(patience, state.run, state.invited)
        raise RoundLost({**self._participants.refused, **missing})

    def _sent_by_site(self) -> dict[str, int]:
        received = self._messenger.received
        now = {site: received.get(node, 0) for node, site in self._participants.nodes.items()}
        return {site: self._sent.get(site, 0) + now.get(site, 0) for site in {*self._sent, *now}}

    def _measure(
        self, collector: Collector, state: RunState, number: int, figures: Figures
    ) -> Figures:
        due = number % self._study.evaluation.every == 0 or number == self._study.training.rounds
        if due and self._hooks.holdout is not None:
            found = self._hooks.holdout.measure(state.released)
            figures = replace(figures, metrics=found.reported, selecting=found.selecting)
        elif due and not self._study.privacy.enabled and self._study.evaluation.site_fraction:
            counts = self._histogram(collector, number, state.released)
            if counts is not None:
                units = open_units(self._study)
                whole = counts if units == 1 else counts / units
                figures = replace(figures, metrics=self._study.task.measure_counts(whole))
        self._hooks.notify(Measured(figures, self._study.training.rounds))
        return figures

    def _release(self, collector: Collector, state: RunState) -> RunState:
        """Request the study's noised evaluation of the model that is handed out, once; a failure
        is not repeated."""
        names = tuple(sorted(self._participants.sites))
        state = replace(state, release=Released(asked=names))
        # Before it is asked for: the sites charge it once, so a resumed run must not ask again.
        self._save(state)
        found = None
        # The model is there; that it was not measured is no reason to lose it.
        with contextlib.suppress(TooFewSites, SecureAggregationError):
            handed = delivered(self._study, state)
            found = collector.histogram(self._study.training.rounds, handed.model)
        self._participants.refused.update(collector.refused)
        released = Released(asked=names) if found is None else self._measured(names, found)
        self._hooks.notify(ReleaseMade(released))
        return replace(state, release=released)

    def _measured(self, asked: tuple[str, ...], found: Histograms) -> Released:
        mechanism = release_mechanism(self._study)
        assert mechanism is not None
        cell = mechanism.noise_multiplier * sensitivity(self._study) / UNITS
        noise = cell * math.sqrt(found.sites)
        metrics = self._study.task.measure_counts(found.total / UNITS, noise)
        return Released(asked, found.sites, noise, metrics)

    def _histogram(self, collector: Collector, number: int, model: Vector) -> Counts | None:
        try:
            found = collector.histogram(number, model)
            return None if found is None else found.total
        except (TooFewSites, TooFewSurvivors):
            if self._hooks.patience is None:
                raise
            # The round has its model; that it was not measured is no reason to train it again.
            return None


def advanced(state: RunState, number: int, mean: Vector, settings: Aggregation) -> RunState:
    """Return the state after a round whose mean update is ``mean``: the server's step.

    Raises:
        UpdateInvalid: see ``step``.
    """
    model, optimizer = step(state.model, mean, state.optimizer, settings)
    average = state.average
    if settings.ema:
        before = model if average is None else average
        average = averaged(before, model, settings.ema, number - len(state.lost))
    return replace(state, completed=number, model=model, optimizer=optimizer, average=average)
