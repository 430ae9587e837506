"""Flower ClientApp of a site; deployment, simulation and tests all run it.

Every answer is a message of ``protocol.round_messages``; ``envelope`` logs it, and turns errors
into refusals.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from cloister_fl.client.admission import gate
from cloister_fl.client.app_state import Kept
from cloister_fl.client.data.loading import load_frozen
from cloister_fl.client.envelope import answer_message, respond
from cloister_fl.client.ledger.rollback import compare
from cloister_fl.client.secure_aggregation import exchange as masked
from cloister_fl.client.site.folder import Site
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.evaluation import exact_counts
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.local_training import train_round
from cloister_fl.client.training.noised_evaluation import counts_in_units, noised
from cloister_fl.errors import (
    CloisterError,
    MessageInvalid,
)
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.frozen_backbone import FrozenBackbone
from cloister_fl.networks.pretrained import MODELS_FOLDER
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    ROSTER_KEY,
    Counts,
    Evaluated,
    EvaluateTask,
    Exchange,
    Exchanged,
    Octets,
    Prepare,
    Prepared,
    RoundMessage,
    TrainTask,
    Update,
    Vector,
    octets,
    signed_answer,
)
from cloister_fl.study import study_network
from cloister_fl.study.cost import release_mechanism
from cloister_fl.study.schema import Study, study_from_canonical

if TYPE_CHECKING:
    from torch import nn


class SiteApp(ClientApp):
    """A ClientApp with what it keeps between messages.

    Attributes:
        kept: cohorts, key epochs and signatures; they go with the app.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()
        for add, handler in (
            (self.query("prepare"), prepare),
            (self.query("exchange"), exchange),
            (self.train(), train),
            (self.evaluate(), evaluate),
        ):
            add(functools.partial(handler, self.kept))

    def __reduce__(self) -> str:
        # Ray hands the app to a process with each message: it finds there what was kept.
        return "app"

    def refuse(self, message: Message, context: Context, error: CloisterError) -> Message:
        """Answer a message that is not read at all, as one of a run with another bundle."""

        def no(site: Site) -> RoundMessage:
            raise error

        return respond(self.kept, message, context, no)


def prepare(kept: Kept, message: Message, context: Context) -> Message:
    """Judge a study, reserve its cost, then see that the site's data can serve it."""

    def answer(site: Site, task: Prepare) -> Prepared:
        study = study_from_canonical(task.study)
        compare(site, task.heads)
        # Before the roster: a steward is shown both together, and accepts both or neither.
        gate.consent(site, study, invited=task.sites, signatures=task.signatures)
        if study.aggregation.secure:
            masked.require_roster(site, _pin(site, context), task.roster)
        module = _built(site, study)
        if isinstance(module, FrozenBackbone):
            module.require()
        gate.admit(site, study, run=task.run, invited=task.sites, signatures=task.signatures)
        kept.cohort(site, study, lambda: load_frozen(site, study), anew=True)
        if isinstance(module, FrozenBackbone) and not study.training.augment:
            # Now, where reading takes its time anyway, and not in the first round.
            trained_on, _ = kept.parts(site, study, lambda: load_frozen(site, study))
            features_of(module, trained_on)
        # Last: everything else is well, so the answer means "yes, but not now".
        gate.require_hours(site, datetime.datetime.now().time())
        said = signed_answer(site.name, context.node_id, f"{task.run} {study.digest}")
        return Prepared(site=site.name, signature=site.identity().sign(*said))

    return answer_message(kept, message, context, Prepare, answer)


def exchange(kept: Kept, message: Message, context: Context) -> Message:
    """Answer the stages of secure aggregation that need no data."""

    def answer(site: Site, task: Exchange) -> Exchanged:
        study = _admitted(site, task)
        asked = _exchange(kept, site, study, context, task.exchange)
        if asked.mask_request is not None:
            raise MessageInvalid("A vector was requested without a model.")
        return Exchanged(site.name, task.round, octets(asked.answer_without_vector()))

    return answer_message(kept, message, context, Exchange, answer)


def train(kept: Kept, message: Message, context: Context) -> Message:
    """Charge the round, train it, and answer with the update, masked unless the study says not."""

    def answer(site: Site, task: TrainTask) -> Update | Exchanged:
        study = _admitted(site, task)
        if not 1 <= task.round <= study.training.rounds:
            raise MessageInvalid("The study has no such round.")
        # Before the masks: a site that sits a round out keeps its keys, and can help unmask it.
        gate.require_hours(site, datetime.datetime.now().time())

        def trained() -> Vector:
            return _train(kept, site, study, task)

        if not study.aggregation.secure:
            return Update(site=site.name, round=task.round, vector=trained())
        asked = _exchange(kept, site, study, context, task.exchange)
        if asked.mask_request is None:
            raise MessageInvalid("A model was sent without a request for an update.")
        claimed = asked.mask_request.session
        expected = sessions.update_session(
            study,
            asked.roster,
            [name for name, _ in claimed.weights],
            round_number=task.round,
            attempt=claimed.attempt,
            model=task.vector,
        )
        answers = asked.answer(expected, trained, run=task.run, saturate=study.privacy.enabled)
        return Exchanged(site.name, task.round, octets(answers))

    return answer_message(kept, message, context, TrainTask, answer)


def evaluate(kept: Kept, message: Message, context: Context) -> Message:
    """Measure a model on the site's own patients: where privacy is off, or in the release."""

    def answer(site: Site, task: EvaluateTask) -> Evaluated | Exchanged:
        study = _admitted(site, task)
        gate.require_metric(site, study)
        if study.evaluation.site_fraction == 0:
            raise MessageInvalid("The study has no validation patients.")
        last = study.training.rounds
        if not (last if study.releases else 0) <= task.round <= last:
            raise MessageInvalid("The study has no evaluation in this round.")
        if not study.aggregation.secure:
            counts = _histogram(kept, site, study, task)
            return Evaluated(
                site=site.name, round=task.round, bins=counts.shape[-1], counts=counts.reshape(-1)
            )
        asked = _exchange(kept, site, study, context, task.exchange)
        if asked.mask_request is None:
            raise MessageInvalid("A model was sent without a request for a histogram.")
        claimed = asked.mask_request.session
        expected = sessions.histogram_session(
            study,
            [name for name, _ in claimed.weights],
            round_number=task.round,
            attempt=claimed.attempt,
            model=task.vector,
        )

        def counted() -> NDArray[np.float64]:
            return _histogram(kept, site, study, task).reshape(-1).astype(np.float64)

        answers = asked.answer(expected, counted, run=task.run, saturate=study.releases)
        return Exchanged(site.name, task.round, octets(answers))

    return answer_message(kept, message, context, EvaluateTask, answer)


def _admitted(site: Site, task: TrainTask | EvaluateTask | Exchange) -> Study:
    study = study_from_canonical(task.study)
    gate.admit(site, study, run=task.run, invited=task.sites)
    return study


def _pin(site: Site, context: Context) -> Path:
    return Path(str(context.node_config.get(ROSTER_KEY, site.roster)))


def _exchange(
    kept: Kept, site: Site, study: Study, context: Context, data: Octets
) -> masked.Exchange:
    if not study.aggregation.secure:
        raise MessageInvalid("The study is without secure aggregation.")
    return masked.Exchange(site, study, _pin(site, context), data, kept.members)


def _built(site: Site, study: Study) -> nn.Module:
    return study_network.build_for(study, models=site.root / MODELS_FOLDER)


def _loaded(site: Site, study: Study, model: Vector) -> nn.Module:
    module = _built(site, study)
    flat_parameters.load(module, model)
    return module


def _train(kept: Kept, site: Site, study: Study, task: TrainTask) -> Vector:
    module = _loaded(site, study, task.vector)
    if study.privacy.enabled:
        # Before the charge: a network that cannot keep the promise costs the patients nothing.
        require_private(module, size=study.input.size, depth=study.input.depth)
    gate.charge(site, study, run=task.run, round_number=task.round)
    cohort, _ = kept.parts(site, study, lambda: load_frozen(site, study))
    private = study.privacy.enabled
    return train_round(
        module,
        cohort,
        study,
        noise_multiplier=gate.mechanism(study).noise_multiplier if private else 0.0,
        random=SecureRandom() if private else None,
        round_number=task.round,
        steps=study.training.steps_per_round,
        site=site.name,
    )


def _histogram(kept: Kept, site: Site, study: Study, task: EvaluateTask) -> Counts:
    module = _loaded(site, study, task.vector)
    release = release_mechanism(study)
    if release is None:
        _, held_out = kept.parts(site, study, lambda: load_frozen(site, study))
        return exact_counts(module, held_out, study)
    # As for a round: a network that mixes patients would break the release's sensitivity, too.
    require_private(module, size=study.input.size, depth=study.input.depth)
    gate.charge_release(site, study, run=task.run)
    _, held_out = kept.parts(site, study, lambda: load_frozen(site, study))
    return noised(counts_in_units(module, held_out, study), study, release, SecureRandom())


app = SiteApp()
