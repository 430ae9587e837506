"""Collection of the sites' updates and histograms in a round.

Two ways to collect: here in plain messages, for studies without secure aggregation; and in
``secure_collector``, where only sums can be read. Both give the same to the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cloister_fl.errors import TooFewSites
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    Counts,
    Evaluated,
    EvaluateTask,
    Refusal,
    Refused,
    TrainTask,
    Update,
    Vector,
    octets,
)
from cloister_fl.server.rounds.messenger import SILENT, UNREADABLE, Messenger
from cloister_fl.server.rounds.strategies import weighted_mean
from cloister_fl.study.schema import Study

MOST_COUNTED = 1 << 31
"""Most patients in a cell of one site's histogram, in either sign where noise is on it. A thousand
sites' sums stay far within 64 bits."""

_AROUND_BYTES = 256 << 10
_EACH_SITE_BYTES = 4 << 10
"""What an answer holds besides its array, at most: in all, and for each site of the run, of whose
keys, boxes and shares secure aggregation sends one each."""

LATE = "late"
"""The server's own reason for a site that the run did not start with."""

OTHER_LEDGER = "ledger"
"""The server's own reason for a site whose privacy ledger is another one than before."""

REASONS: Mapping[str, str] = {
    Refused.BUNDLE: "it runs another version of Cloister",
    Refused.POLICY: "its policy does not allow the study",
    Refused.APPROVAL: "the study is not approved there yet",
    Refused.HOURS: "it takes part, but is outside its training window",
    Refused.BUDGET: "its privacy budget is not sufficient",
    Refused.SPENT: "the round was already charged there",
    Refused.MESSAGE: "it rejected the request as malformed",
    Refused.MODEL: "the initial model is not the one that the study states",
    Refused.ROSTER: "its trusted roster is another one, or does not list it",
    Refused.PROTOCOL: "a check of secure aggregation failed",
    Refused.DECLINED: "it declined; the reason is shown at the site",
    LATE: "it joined after the run started",
    SILENT: "it did not answer in time",
    UNREADABLE: "its answer could not be read",
    OTHER_LEDGER: "its privacy ledger is another one than before; ask the hospital why, then: "
    "cloister server accept-ledger SITE",
}


@dataclass(frozen=True)
class Members:
    """Who takes part in a run.

    Attributes:
        run: id of the run.
        nodes: site by Flower's node id, of the sites that are here.
        asked: how many sites were asked to take part.
        invited: ids of the sites that the run began with, rising; a resumed run keeps them.
    """

    run: str
    nodes: Mapping[int, str]
    asked: int
    invited: tuple[str, ...]


@dataclass(frozen=True)
class Collected:
    """One round's update.

    Attributes:
        mean: weighted mean of the updates, (D,).
        sites: ids of the sites in it, rising.
        refused: reason by site, of those that are not.
    """

    mean: Vector
    sites: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Histograms:
    """Score histograms of several sites.

    Attributes:
        total: their sum, (curves, 2, bins); noised in the noised evaluation, and in its units.
        sites: how many sites are in it.
    """

    total: Counts
    sites: int


class RoundLost(Exception):
    """Raised where a round has failed for good, yet enough sites are left for the next.

    Not an error of the tree: ``Run`` catches it and reports it as an event.
    """

    def __init__(self, refused: Mapping[str, str]) -> None:
        super().__init__("a round was lost")
        self.refused = refused


class Collector(Protocol):
    """How a run collects what the sites send."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Reason by site, of those that are missing from what was collected last."""
        ...

    def updates(self, number: int, model: Vector) -> Collected:
        """Have every site train a round from ``model``.

        Raises:
            TooFewSites: the round cannot be built.
            RoundLost: it cannot, but the next may.
        """
        ...

    def histogram(self, number: int, model: Vector) -> Histograms | None:
        """Score histograms of ``model`` on the sites' own patients, summed."""
        ...


class PlainCollector:
    """Collects updates without secure aggregation: the server reads each of them."""

    def __init__(self, messenger: Messenger, study: Study, members: Members) -> None:
        self._messenger = messenger
        self._study = study
        self._canonical = study.canonical()
        self._members = members
        self.refused: Mapping[str, str] = {}

    def updates(self, number: int, model: Vector) -> Collected:
        """See ``Collector``."""
        members = self._members
        task = TrainTask(self._canonical, members.run, number, members.asked, octets(), model)
        updates: dict[str, Vector] = {}
        refused: dict[str, str] = {}
        for reply in self._messenger.ask(members.nodes, task, Update):
            name, message = members.nodes[reply.node], reply.message
            if isinstance(message, Update) and _acceptable(message, name, number, model.size):
                updates[name] = message.vector
            else:
                given = message.reason if isinstance(message, Refusal) else Refused.MESSAGE.value
                refused[name] = given
        self.refused = refused
        require_sites(self._study.aggregation.min_sites, len(updates), members.asked, refused)
        names = sorted(updates)
        weights = [self._study.aggregation.weight(name) for name in names]
        mean = weighted_mean([updates[name] for name in names], weights)
        return Collected(mean, tuple(names), refused)

    def histogram(self, number: int, model: Vector) -> Histograms | None:
        """See ``Collector``."""
        members = self._members
        task = EvaluateTask(self._canonical, members.run, number, members.asked, octets(), model)
        replies = self._messenger.ask(members.nodes, task, Evaluated)
        shape = sessions.counts_shape(self._study)
        least = -MOST_COUNTED if self._study.releases else 0
        usable = [
            reply.message.counts
            for reply in replies
            if isinstance(reply.message, Evaluated)
            and (reply.message.site, reply.message.round) == (members.nodes[reply.node], number)
            and reply.message.counts.size == math.prod(shape)
            and bool(
                ((reply.message.counts >= least) & (reply.message.counts <= MOST_COUNTED)).all()
            )
        ]
        if not usable:
            return None
        total: Counts = np.sum(usable, axis=0)
        return Histograms(total.reshape(shape), len(usable))


def reply_bytes(study: Study, dimension: int, sites: int) -> int:
    """Most bytes of arrays and values that an honest answer to any message of a study has.

    Its array is an update, masked or not, of 4 bytes a parameter, or a histogram of 8 bytes a
    count.

    Args:
        study: what is trained.
        dimension: parameters of its network.
        sites: how many may take part.
    """
    counts = math.prod(sessions.counts_shape(study))
    return max(4 * dimension, 8 * counts) + _AROUND_BYTES + _EACH_SITE_BYTES * sites


def require_sites(needed: int, present: int, asked: int, refused: Mapping[str, str]) -> None:
    """Require that enough sites take part.

    Raises:
        TooFewSites: with the reason that each of the others gave.
    """
    if present >= needed:
        return
    raise TooFewSites(
        f"{present} of {asked} sites take part, and {needed} are needed.",
        why=in_words(refused),
        remedy="Correct what the sites report, add sites, or lower aggregation.min_sites.",
    )


def in_words(refused: Mapping[str, str]) -> str:
    """Sites and why they are missing, in one sentence; empty where none is."""
    why = "; ".join(
        f"{name}: {REASONS.get(reason, REASONS[Refused.DECLINED])}"
        for name, reason in sorted(refused.items())
    )
    return f"{why}." if why else ""


def _acceptable(update: Update, name: str, number: int, size: int) -> bool:
    return (
        update.site == name
        and update.round == number
        and update.vector.shape == (size,)
        and bool(np.isfinite(update.vector).all())
    )
