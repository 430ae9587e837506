"""The run: prepare the sites, then round after round until the study is done.

What a crash can cost is one round: before a round leaves, ``Checkpoints.mark_sent`` notes it;
after it, the whole state is saved. With privacy on, a round that was sent and not finished is
charged at the sites and is never trained again: a resumed run counts it as lost and goes on
with the next, so no site ever pays more than the study's epsilon.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cloister_common import networks, vectors
from cloister_common.errors import TooFewSites
from cloister_common.metrics import Metrics
from cloister_common.privacy.accounting import calibrate, epsilon_pld
from cloister_common.records import (
    Evaluated,
    EvaluateTask,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    TrainTask,
    Update,
    Vector,
)
from cloister_common.study import Study
from cloister_server.checkpoint import Checkpoints, Figures, RunState
from cloister_server.evaluation import figures_of, sum_counts
from cloister_server.mailbox import Mailbox
from cloister_server.optimizers import OptimizerState, step, weighted_mean

REASONS: Mapping[str, str] = {
    Refused.POLICY: "its policy does not allow the study",
    Refused.BUDGET: "its privacy budget does not suffice",
    Refused.SPENT: "the round was already charged there",
    Refused.MESSAGE: "it did not understand the request",
    Refused.DECLINED: "it declined; its own operator sees why",
}


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


Event = Began | Measured


def _ignore(event: Event) -> None:
    del event


@dataclass(frozen=True)
class Hooks:
    """What the caller adds to a run.

    Attributes:
        evaluate: measures a flat model on a hold-out that belongs to no site.
        notify: is told of progress.
    """

    evaluate: Callable[[Vector], Metrics] | None = None
    notify: Callable[[Event], None] = _ignore


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
    """

    def __init__(
        self,
        mailbox: Mailbox,
        study: Study,
        checkpoints: Checkpoints,
        hooks: Hooks,
        *,
        expected: int,
    ) -> None:
        self._mailbox = mailbox
        self._study = study
        self._canonical = study.canonical()
        self._checkpoints = checkpoints
        self._hooks = hooks
        self._expected = expected
        self._nodes: dict[int, str] = {}
        self._refused: dict[str, str] = {}
        self._invited = 0

    def execute(self, *, resume: bool) -> Outcome:
        """Run to the end and return the outcome.

        Raises:
            TooFewSites: fewer sites than the study's minimum take part.
            NothingToResume, ResumeMismatch: see ``Checkpoints.load``.
        """
        began = time.monotonic()
        if resume:
            state, sent, names = self._checkpoints.load(self._study)
            state, first = self._after_crash(state, sent, names)
        else:
            state, first = self._fresh(), 1
        before = state.seconds
        self._prepare(state.run)
        rounds = self._study.training.rounds
        self._hooks.notify(
            Began(
                tuple(sorted(self._nodes.values())), dict(self._refused), first, rounds, state.lost
            )
        )
        if not state.figures:
            # Measured here and not when it is drawn: the sites measure it where privacy is off.
            state = replace(state, figures=(self._measure(state, 0, Figures(0, 0, 0.0, 0.0)),))
        self._checkpoints.save(self._study, state)
        for number in range(first, rounds + 1):
            state = self._round(number, state)
            state = replace(state, seconds=before + time.monotonic() - began)
            self._checkpoints.save(self._study, state)
        return Outcome(state, tuple(sorted(self._nodes.values())), dict(self._refused))

    def _fresh(self) -> RunState:
        study = self._study
        module = networks.build(
            study.network, outputs=study.outputs, size=study.input.size, seed=study.training.seed
        )
        model = vectors.flatten(module)
        optimizer = OptimizerState.fresh(model.size, study.aggregation)
        return RunState(secrets.token_hex(16), 0, model, optimizer)

    def _after_crash(self, state: RunState, sent: int, names: list[str]) -> tuple[RunState, int]:
        if sent <= state.completed or not self._study.privacy.enabled:
            return state, state.completed + 1
        started = dict(state.started)
        for name in names:
            started[name] = started.get(name, 0) + 1
        return replace(state, lost=(*state.lost, sent), started=started, completed=sent), sent + 1

    def _prepare(self, run: str) -> None:
        nodes = self._mailbox.wait_for_nodes(self._expected)
        self._invited = len(nodes)
        task = Prepare(study=self._canonical, run=run, sites=self._invited)
        for reply in self._mailbox.ask(nodes, task, Prepared):
            message = reply.message
            if isinstance(message, Refusal):
                self._refused[message.site or f"node {reply.node}"] = message.reason
            elif message.site in self._nodes.values():
                self._refused[f"{message.site} (second node)"] = Refused.MESSAGE.value
            else:
                self._nodes[reply.node] = message.site
        self._require(len(self._nodes), self._refused)

    def _require(self, present: int, refused: Mapping[str, str]) -> None:
        needed = self._study.aggregation.min_sites
        if present >= needed:
            return
        why = "; ".join(
            f"{name}: {REASONS.get(reason, REASONS[Refused.DECLINED])}"
            for name, reason in sorted(refused.items())
        )
        raise TooFewSites(
            f"{present} of {self._invited} sites take part, and the study needs {needed}.",
            why=f"{why}." if why else "",
            remedy="Mend what the sites report, add sites, or lower aggregation.min_sites.",
        )

    def _round(self, number: int, state: RunState) -> RunState:
        study = self._study
        began = time.monotonic()
        nodes = dict(sorted(self._nodes.items(), key=lambda item: item[1]))
        self._checkpoints.mark_sent(number, list(nodes.values()))
        task = TrainTask(self._canonical, state.run, number, self._invited, state.model)
        updates: dict[str, Vector] = {}
        refused: dict[str, str] = {}
        sent = dict(state.sent)
        for reply in self._mailbox.ask(nodes, task, Update):
            name, message = nodes[reply.node], reply.message
            sent[name] = sent.get(name, 0) + reply.size
            if isinstance(message, Update) and _acceptable(message, name, number, state.model.size):
                updates[name] = message.vector
            else:
                given = message.reason if isinstance(message, Refusal) else Refused.MESSAGE.value
                refused[name] = given
        self._refused.update(refused)
        self._require(len(updates), refused)
        for name in updates:
            self._refused.pop(name, None)
        started = {name: state.started.get(name, 0) + 1 for name in nodes.values()}
        names = sorted(updates)
        weights = [study.aggregation.weights.get(name, 1.0) for name in names]
        mean = weighted_mean([updates[name] for name in names], weights)
        model, optimizer = step(state.model, mean, state.optimizer, study.aggregation)
        state = replace(
            state,
            completed=number,
            model=model,
            optimizer=optimizer,
            started={**state.started, **started},
            sent=sent,
        )
        figures = Figures(
            round=number,
            sites=len(names),
            seconds=time.monotonic() - began,
            update_norm=float(np.linalg.norm(mean.astype(np.float64))),
            epsilon=study_epsilon(study, max(state.started.values())),
        )
        return replace(state, figures=(*state.figures, self._measure(state, number, figures)))

    def _measure(self, state: RunState, number: int, figures: Figures) -> Figures:
        due = number % self._study.evaluation.every == 0 or number == self._study.training.rounds
        if due and self._hooks.evaluate is not None:
            figures = figures_of(figures, self._hooks.evaluate(state.model))
        elif due and not self._study.privacy.enabled and self._study.evaluation.site_fraction:
            figures = self._measure_at_sites(state, number, figures)
        self._hooks.notify(Measured(figures, self._study.training.rounds))
        return figures

    def _measure_at_sites(self, state: RunState, number: int, figures: Figures) -> Figures:
        task = EvaluateTask(self._canonical, state.run, number, self._invited, state.model)
        replies = self._mailbox.ask(self._nodes, task, Evaluated)
        answers = [reply.message for reply in replies if isinstance(reply.message, Evaluated)]
        measured = sum_counts(answers, self._study.outputs)
        return figures if measured is None else figures_of(figures, measured)


def _acceptable(update: Update, name: str, number: int, size: int) -> bool:
    return (
        update.site == name
        and update.round == number
        and update.vector.shape == (size,)
        and bool(np.isfinite(update.vector).all())
    )


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
