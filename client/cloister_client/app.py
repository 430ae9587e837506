"""The ClientApp: the one that a deployment, the simulation and the tests all run.

Every answer is a message of ``records.py``. An error becomes a refusal with a reason of the
closed list; its text stays at the site, as a notice for its operator. Flower is never handed an
exception: it would send the text to the server.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cloister_client import gate
from cloister_client.cohort import Cohort, load_cohort, split
from cloister_client.evaluation import score_histogram
from cloister_client.notices import clear_notice, leave_notice
from cloister_client.randomness import SecureRandom
from cloister_client.site import Site, open_site
from cloister_client.training import train_round
from cloister_common import networks, vectors
from cloister_common.errors import (
    BudgetExhausted,
    CloisterError,
    InternalError,
    MessageInvalid,
    PolicyRefused,
    RoundAlreadySpent,
)
from cloister_common.records import (
    Evaluated,
    EvaluateTask,
    MessageT,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    RoundMessage,
    TrainTask,
    Update,
    pack,
    unpack,
)
from cloister_common.study import Study, study_from_canonical

SITE_KEY = "site"
"""Key of Flower's node configuration that names the site's directory."""

_COHORTS_KEPT = 16
_cohorts: OrderedDict[tuple[Path, str], Cohort] = OrderedDict()

_REASONS: dict[type[CloisterError], Refused] = {
    PolicyRefused: Refused.POLICY,
    BudgetExhausted: Refused.BUDGET,
    RoundAlreadySpent: Refused.SPENT,
    MessageInvalid: Refused.MESSAGE,
}

app = ClientApp()


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Judge a study, reserve its cost, then see that the site's data can serve it."""

    def answer(site: Site, task: Prepare) -> Prepared:
        study = study_from_canonical(task.study)
        gate.admit(site, study, run=task.run, invited=task.sites)
        _cohort(site, study)
        return Prepared(site=site.name)

    return _answer(message, context, Prepare, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Charge the round, train it, and answer with the update."""

    def answer(site: Site, task: TrainTask) -> Update:
        study = study_from_canonical(task.study)
        if not 1 <= task.round <= study.training.rounds:
            raise MessageInvalid("A round was asked for that the study does not have.")
        gate.admit(site, study, run=task.run, invited=task.sites)
        module = networks.build(
            study.network, outputs=study.outputs, size=study.input.size, seed=study.training.seed
        )
        vectors.load(module, task.vector)
        gate.charge(site, study, run=task.run, round_number=task.round)
        cohort = _training_part(_cohort(site, study), study)
        private = study.privacy.enabled
        update = train_round(
            module,
            cohort,
            study,
            noise_multiplier=gate.mechanism(study).noise_multiplier if private else 0.0,
            random=SecureRandom() if private else None,
            round_number=task.round,
            steps=study.training.steps_per_round,
            site=site.name,
        )
        return Update(site=site.name, round=task.round, vector=update)

    return _answer(message, context, TrainTask, answer)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure a model on the site's own patients; only where privacy is off."""

    def answer(site: Site, task: EvaluateTask) -> Evaluated:
        study = study_from_canonical(task.study)
        gate.admit(site, study, run=task.run, invited=task.sites)
        if study.privacy.enabled:
            raise PolicyRefused(
                "A site does not evaluate while privacy is on.",
                why="Its figures would leave uncharged.",
            )
        module = networks.build(
            study.network, outputs=study.outputs, size=study.input.size, seed=study.training.seed
        )
        vectors.load(module, task.vector)
        _, held_out = split(_cohort(site, study), study.evaluation.site_fraction)
        counts = score_histogram(module, held_out, study)
        return Evaluated(
            site=site.name, round=task.round, bins=counts.shape[-1], counts=counts.reshape(-1)
        )

    return _answer(message, context, EvaluateTask, answer)


def _answer(
    message: Message,
    context: Context,
    kind: type[MessageT],
    handler: Callable[[Site, MessageT], RoundMessage],
) -> Message:
    site: Site | None = None
    reply: RoundMessage
    try:
        site = open_site(Path(str(context.node_config[SITE_KEY])))
        reply = handler(site, unpack(message.content, kind))
        clear_notice(site.root)
    except CloisterError as error:
        reply = _refuse(site, error)
    except Exception as error:
        # The type alone: the text of a library's exception can quote what it was given.
        fault = InternalError(
            f"Cloister met a fault of its own ({type(error).__name__}).",
            remedy="Report it, with the version of Cloister and the study file.",
        )
        reply = _refuse(site, fault)
    return Message(content=pack(reply), reply_to=message)


def _refuse(site: Site | None, error: CloisterError) -> Refusal:
    reason = _REASONS.get(type(error), Refused.DECLINED)
    if site is None:
        return Refusal(site="", reason=reason.value)
    leave_notice(site.root, error)
    return Refusal(site=site.name, reason=reason.value)


def _cohort(site: Site, study: Study) -> Cohort:
    """The site's patients, kept in memory for as long as this process lives."""
    key = (site.root, study.digest)
    if key in _cohorts:
        _cohorts.move_to_end(key)
        return _cohorts[key]
    _cohorts[key] = load_cohort(site, study)
    while len(_cohorts) > _COHORTS_KEPT:
        _cohorts.popitem(last=False)
    return _cohorts[key]


def _training_part(cohort: Cohort, study: Study) -> Cohort:
    if study.privacy.enabled or study.evaluation.site_fraction == 0:
        return cohort
    return split(cohort, study.evaluation.site_fraction)[0]
