"""A site for one audit: a folder of its own, with keys, policy, ledger and log, and no data.

It is asked by messages, as the coordinator asks, and the installed ClientApp answers. Its patients
are made up and are put where the app keeps those it has read; nothing of a hospital is in it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import Context, Message, Metadata, RecordDict
from numpy.typing import NDArray

from cloister_fl.client.admission import gate
from cloister_fl.client.app import SiteApp
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.client.site.policy import Policy
from cloister_fl.networks.pretrained import MODELS_FOLDER
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    Evaluated,
    EvaluateTask,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Update,
    octets,
    pack,
    unpack,
)
from cloister_fl.study.initial_model import digest_of
from cloister_fl.study.schema import Study

Answer = TypeVar("Answer", bound=RoundMessage)

RUN = "audit"
_TYPES = {"prepare": "query.prepare", "train": "train", "evaluate": "evaluate"}
_NODE = 2
_MOST_EPSILON = 1000.0


class RoundRefused(Exception):
    """The site's answer to a message was a refusal.

    Attributes:
        reason: the word of the closed list.
        told: code of the error, and what it says.
    """

    def __init__(self, reason: str, told: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.told = told


class ThrowawaySite:
    """A made-up site of one study.

    Args:
        root: the folder; it must not exist, and its parent must be private.
        study: without secure aggregation, so that each update is seen.
        first: the weights that round 1 begins with, (D,): the site's study carries their hash.
        name: the site's name in the federation.
        run: the run that asks.
        app: the ClientApp that answers; else one of its own.
        models: a folder of pretrained weights, where the study's network needs them.
    """

    def __init__(
        self,
        root: Path,
        study: Study,
        first: NDArray[np.float32],
        *,
        name: str = "anker",
        run: str = RUN,
        app: SiteApp | None = None,
        models: Path | None = None,
    ) -> None:
        study = study.bound_to(digest_of(first))
        self.study, self.run = study, run
        self.app = app or SiteApp()
        self._text, self._sites = study.canonical(), max(5, study.aggregation.min_sites)
        policy = Policy(
            max_epsilon_study=_MOST_EPSILON,
            max_epsilon_lifetime=_MOST_EPSILON,
            ledger_delta=max(study.privacy.delta, 1e-5),
            # Made-up patients: any delta is small enough.
            patients_at_most=1,
            # Little noise, so that the audit sees single patients.
            min_noise_multiplier=0.0,
            min_patients=1,
            min_patients_per_class_without_privacy=0,
            require_secure_aggregation=False,
            colluders=0,
            min_sites=1,
            max_rounds=10_000,
            metrics=("score-histograms",),
            approve="listed",
            approved_hashes=(study.digest,),
        )
        self.site = init_site(root, name=name, policy=policy)
        if models is not None and models.is_dir():
            (self.site.root / MODELS_FOLDER).symlink_to(models)

    def ask_for(self, study: Study) -> None:
        """Ask for another study from now on, which nobody here approved."""
        self.study, self._text = study, study.canonical()

    @property
    def session(self) -> SiteSession:
        """What the app answers from."""
        return self.app.kept.session(self.site.root)

    @property
    def admission(self) -> Admission:
        """The study, let in as the app lets it in."""
        return gate.admit(self.session, self._text, run=self.run, invited=self._sites)

    def place(self, cohort: Cohort) -> None:
        """Put patients where the app keeps those that it has read."""
        self.app.kept.cohort(self.session, self.admission, lambda: cohort, anew=True)

    def prepare(self) -> None:
        """Ask whether the site takes part; it then reads what lies in its folder.

        Raises:
            RoundRefused: it does not.
        """
        self._ask(Prepare(self._text, self.run, self._sites, "", b"", ""), Prepared)

    def train(self, number: int, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """Ask for a round's update, float64 (D,).

        Raises:
            RoundRefused: there is none.
        """
        task = TrainTask(self._text, self.run, number, self._sites, octets(), model)
        return self._ask(task, Update).vector.astype(np.float64)

    def evaluate(self, model: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ask for the noised evaluation: counts in units, flat.

        Raises:
            RoundRefused: there is none.
        """
        last = self.study.training.rounds
        task = EvaluateTask(self._text, self.run, last, self._sites, octets(), model)
        return self._ask(task, Evaluated).counts

    def entries(self) -> list[tuple[str, dict[str, object]]]:
        """What the privacy ledger says: kinds of its entries and what they hold."""
        ledger = Ledger.open(self.site.ledger, delta=self.site.policy.ledger_delta)
        return [(entry.kind, dict(entry.body)) for entry in ledger.entries()]

    def _ask(self, task: RoundMessage, kind: type[Answer]) -> Answer:
        context = Context(
            run_id=1,
            node_id=_NODE,
            node_config={SITE_KEY: str(self.site.root)},
            state=RecordDict(),
            run_config={},
        )
        # With metadata of its own, so that nothing is set for the whole process, as Flower does.
        metadata = Metadata(
            run_id=1,
            message_id="1",
            src_node_id=1,
            dst_node_id=_NODE,
            reply_to_message_id="",
            group_id=str(getattr(task, "round", 0)),
            created_at=time.time(),
            ttl=3600.0,
            message_type=_TYPES[task.kind],
            src_task_id=1,
            dst_task_id=None,
        )
        message = Message(content=pack(task), metadata=metadata)  # type: ignore[call-overload]
        reply = self.app(message, context)
        found = unpack(reply.content, kind, Refusal)
        if isinstance(found, Refusal):
            last = read_last_refusal(self.site.root)
            told = f"{last.code}: {last.message}" if last else "no reason is known"
            raise RoundRefused(found.reason, told)
        assert isinstance(found, kind)
        return found
