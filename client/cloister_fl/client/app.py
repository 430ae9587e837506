"""Flower ClientApp of a site; deployment, simulation and tests all run it.

A round reads as it happens: open the exchange, charge, train, mask, answer. Every answer is a
message of ``protocol.round_messages``; ``envelope`` logs it, and turns errors into refusals.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cloister_fl.client.admission import gate
from cloister_fl.client.app_state import Kept, build
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.cohort_errors import unread
from cloister_fl.client.data.loading import load_for_run, nobody
from cloister_fl.client.envelope import answer_message, respond
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.secure_aggregation import exchange as masked
from cloister_fl.client.site.data_notice import note_data
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.evaluation import exact_counts
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.local_training import train_round
from cloister_fl.client.training.noised_evaluation import counts_in_units, noised
from cloister_fl.errors import (
    CloisterError,
    MessageInvalid,
    UpdateInvalid,
)
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.frozen_backbone import FrozenBackbone
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    ROSTER_KEY,
    Counts,
    Evaluated,
    EvaluateTask,
    Exchange,
    Exchanged,
    Finish,
    Finished,
    Prepare,
    Prepared,
    RoundMessage,
    TrainTask,
    Update,
    Vector,
    octets,
    signed_answer,
    taking_part,
)
from cloister_fl.secagg import Session
from cloister_fl.study.binding import require_bound
from cloister_fl.study.initial_model import digest_of, require_initial
from cloister_fl.study.schema import Study, study_from_canonical

if TYPE_CHECKING:
    from torch import nn


class SiteApp(ClientApp):
    """A ClientApp with what it keeps between messages.

    Attributes:
        kept: sessions, cohorts and key epochs; they go with the app.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()
        for add, handler in (
            (self.query("prepare"), prepare),
            (self.query("exchange"), exchange),
            (self.query("finish"), finish),
            (self.train(), train),
            (self.evaluate(), evaluate),
        ):
            add(functools.partial(handler, self.kept))

    def __reduce__(self) -> str:
        # Ray hands the app to a process with each message: it finds there what was kept.
        return "app"

    def verify(self, root: Path) -> None:
        """Read ledger and audit log of a site whole, before the first message asks for it.

        What is wrong is the site's last refusal, and the answer to each message.
        """
        session = self.kept.session(root)
        try:
            session.require_newest()
        except CloisterError as error:
            session.keep_refusal(error)

    def refuse(self, message: Message, context: Context, error: CloisterError) -> Message:
        """Answer a message that is not read at all, as one of a run with another bundle."""

        def no(session: SiteSession) -> RoundMessage:
            raise error

        return respond(self.kept, message, context, no)


def prepare(kept: Kept, message: Message, context: Context) -> Message:
    """Judge a study, and reserve its cost.

    With privacy on, the answer is the steward's or a rule's: the data are looked at to have them
    at hand, and to tell the site's own people what is wrong with them. Without, data that cannot
    serve the study are a refusal.
    """

    def answer(session: SiteSession, task: Prepare) -> Prepared:
        site, study = session.site, study_from_canonical(task.study)
        session.compare(task.heads)
        # A steward is not asked about a study that any model could begin.
        require_bound(study)
        # Before the roster: a steward is shown both together, and accepts both or neither.
        gate.consent(session, study, invited=task.sites, signatures=task.signatures)
        if study.aggregation.secure:
            masked.require_roster(session, _pin(session, context), task.roster)
        module = build(session, study)
        if isinstance(module, FrozenBackbone):
            module.require()
        admission = gate.admit(session, task.study, run=task.run, invited=task.sites)
        kept.cohort(session, admission, lambda: load_for_run(site, study), anew=True)
        if isinstance(module, FrozenBackbone) and not study.training.augment:
            # Now, where reading takes its time anyway, and not in the first round.
            with _told_at_the_site(session, study):
                told = functools.partial(_tell, session, study) if study.privacy.enabled else None
                features_of(module, _parts(kept, session, admission)[0], told)
        # Last: everything else is well, so the answer means "yes, but not now".
        gate.require_hours(site, datetime.datetime.now().time())
        ledger = session.ledger_name() if admission.charges is not None else ""
        word = taking_part(task.run, study.digest, ledger)
        said = signed_answer(site.name, context.node_id, word)
        return Prepared(site.name, session.identity.sign(*said), ledger)

    return answer_message(kept, message, context, Prepare, answer)


def exchange(kept: Kept, message: Message, context: Context) -> Message:
    """Answer the stages of secure aggregation that need no data."""

    def answer(session: SiteSession, task: Exchange) -> Exchanged:
        admission = gate.admit(session, task.study, run=task.run, invited=task.sites)
        with _exchange(kept, session, admission, context, task) as opened:
            if opened.mask_request is not None:
                raise MessageInvalid("A vector was requested without a model.")
            return Exchanged(session.site.name, task.round, octets(opened.answer()))

    return answer_message(kept, message, context, Exchange, answer)


def train(kept: Kept, message: Message, context: Context) -> Message:
    """Charge the round, train it, and answer with the update, masked unless the study says not."""

    def answer(session: SiteSession, task: TrainTask) -> Update | Exchanged:
        admission = gate.admit(session, task.study, run=task.run, invited=task.sites)
        study, name = admission.study, session.site.name
        if not 1 <= task.round <= study.training.rounds:
            raise MessageInvalid("The study has no such round.")
        # Before the masks: a site that sits a round out keeps its keys, and can help unmask it.
        gate.require_hours(session.site, datetime.datetime.now().time())
        if not study.aggregation.secure:
            if task.round == 1:
                require_initial(study, digest_of(task.vector))
            network = kept.network(session, admission, task.vector)
            gate.charge(session, admission, round_number=task.round)
            return Update(name, task.round, _trained(kept, session, admission, network, task.round))
        with _exchange(kept, session, admission, context, task) as opened:
            asked = _asked_of(opened)
            expected = sessions.update_session(
                study,
                [name for name, _ in asked.weights],
                round_number=task.round,
                attempt=asked.attempt,
                model=task.vector,
            )
            if task.round == 1:
                require_initial(study, expected.model.hex())
            if opened.open(expected, run=task.run):
                network = kept.network(session, admission, task.vector)
                gate.charge(session, admission, round_number=task.round)
                opened.keep(_trained(kept, session, admission, network, task.round))
            opened.mask(saturate=study.privacy.enabled)
            return Exchanged(name, task.round, octets(opened.answer()))

    return answer_message(kept, message, context, TrainTask, answer)


def evaluate(kept: Kept, message: Message, context: Context) -> Message:
    """Measure a model on the site's own patients: where privacy is off, or in the release."""

    def answer(session: SiteSession, task: EvaluateTask) -> Evaluated | Exchanged:
        admission = gate.admit(session, task.study, run=task.run, invited=task.sites)
        study, name = admission.study, session.site.name
        gate.require_metric(session.site, study)
        if study.evaluation.site_fraction == 0:
            raise MessageInvalid("The study has no validation patients.")
        last = study.training.rounds
        if not (last if study.releases else 0) <= task.round <= last:
            raise MessageInvalid("The study has no evaluation in this round.")
        if task.round == 0:
            # What is measured before training is the model that training begins with.
            require_initial(study, digest_of(task.vector))
        if not study.aggregation.secure:
            network = kept.network(session, admission, task.vector)
            if study.releases:
                gate.charge_release(session, admission)
            counts = _counted(kept, session, admission, network)
            return Evaluated(name, task.round, counts.shape[-1], counts.reshape(-1))
        with _exchange(kept, session, admission, context, task) as opened:
            asked = _asked_of(opened)
            expected = sessions.histogram_session(
                study,
                [name for name, _ in asked.weights],
                round_number=task.round,
                attempt=asked.attempt,
                model=task.vector,
            )
            if opened.open(expected, run=task.run):
                network = kept.network(session, admission, task.vector)
                if study.releases:
                    gate.charge_release(session, admission)
                counts = _counted(kept, session, admission, network)
                opened.keep(counts.reshape(-1).astype(np.float64))
            opened.mask(saturate=study.releases)
            return Exchanged(name, task.round, octets(opened.answer()))

    return answer_message(kept, message, context, EvaluateTask, answer)


def finish(kept: Kept, message: Message, context: Context) -> Message:
    """Hear that a run has ended early: where the policy said so, release what was not started."""

    def answer(session: SiteSession, task: Finish) -> Finished:
        gate.end(session, task.study, run=task.run)
        return Finished(session.site.name)

    return answer_message(kept, message, context, Finish, answer)


def _pin(session: SiteSession, context: Context) -> Path:
    return Path(str(context.node_config.get(ROSTER_KEY, session.roster)))


def _exchange(
    kept: Kept,
    session: SiteSession,
    admission: Admission,
    context: Context,
    task: TrainTask | EvaluateTask | Exchange,
) -> masked.Exchange:
    if not admission.study.aggregation.secure:
        raise MessageInvalid("The study is without secure aggregation.")
    pin = _pin(session, context)
    return masked.Exchange(session, admission, pin, task.exchange, kept.members)


def _asked_of(opened: masked.Exchange) -> Session:
    """The session that the server claims."""
    if opened.mask_request is None:
        raise MessageInvalid("A model was sent without a request for a vector.")
    return opened.mask_request.session


def _parts(kept: Kept, session: SiteSession, admission: Admission) -> tuple[Cohort, Cohort]:
    """Who is trained on and who is kept apart."""
    return kept.parts(session, admission, lambda: load_for_run(session.site, admission.study))


@contextlib.contextmanager
def _told_at_the_site(session: SiteSession, study: Study) -> Iterator[None]:
    """With privacy on, tell the site's own people of an error, and nobody else: go on after it.

    What is done in here depends on data, whose errors would be exact and uncharged answers.
    """
    try:
        yield
    except Exception as error:
        if not study.privacy.enabled:
            raise
        _tell(session, study, error)


def _tell(session: SiteSession, study: Study, error: Exception) -> None:
    """Tell the site's own people of what failed on patients."""
    note_data(session.site.root, study.digest, [unread(error)], lasts=True)


def _trained(
    kept: Kept, session: SiteSession, admission: Admission, network: nn.Module, round_number: int
) -> Vector:
    """The update of a round that is charged.

    With privacy on it is one whatever the patients are: where training on them fails, of a round
    without any, which is noise. Weights that noise made infinite are no update: zeros.
    """
    study, charges = admission.study, admission.charges

    def trained_on(cohort: Cohort) -> Vector:
        return train_round(
            network,
            cohort,
            study,
            noise_multiplier=charges.step.noise_multiplier if charges is not None else 0.0,
            random=SecureRandom() if charges is not None else None,
            round_number=round_number,
            steps=study.training.steps_per_round,
            site=session.site.name,
            told=functools.partial(_tell, session, study) if charges is not None else None,
        )

    if charges is None:
        return trained_on(_parts(kept, session, admission)[0])
    with _told_at_the_site(session, study):
        return trained_on(_parts(kept, session, admission)[0])
    try:
        # What fails here, too, is no matter of the data.
        return trained_on(nobody(study))
    except UpdateInvalid:
        return np.zeros(flat_parameters.layout_of(network).size, np.float32)


def _counted(kept: Kept, session: SiteSession, admission: Admission, network: nn.Module) -> Counts:
    """What the patients count for; noised where it is charged, else of a study without privacy."""
    study, charges = admission.study, admission.charges
    if charges is None or charges.release is None:
        return exact_counts(network, _parts(kept, session, admission)[1], study)
    counts = counts_in_units(network, nobody(study), study)
    with _told_at_the_site(session, study):
        # Exact counts of single patients, until the noise is on them.
        held_out = _parts(kept, session, admission)[1]
        told = functools.partial(_tell, session, study)
        counts = counts_in_units(network, held_out, study, told)
    return noised(counts, study, charges.release, SecureRandom())


app = SiteApp()
