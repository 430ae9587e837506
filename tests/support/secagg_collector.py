"""The server's collector over sites in memory, between which a test puts hospitals that lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cloister_fl.errors import SecureAggregationError
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    Exchange,
    Exchanged,
    Refusal,
    RoundMessage,
    TrainTask,
    octets,
)
from cloister_fl.secagg.messages.codec import Bundle, MaskRequest, Message, decode
from cloister_fl.secagg.participant import Site, SitePolicy
from cloister_fl.server.rounds.collector import Collected, Members
from cloister_fl.server.rounds.messenger import SILENT, Reply
from cloister_fl.server.rounds.secure_collector import SecureCollector
from support.federations import study
from support.secagg import MemoryStore, identity_of, roster_of, site_names

Lie = Callable[[str, list[Message], tuple[Message, ...]], list[Message] | None]
"""A site's name, its answers and what they answer; what it sends instead, None for nothing."""

DIMENSION = 5


class Collection:
    """A ``SecureCollector`` whose messenger is the test: ``lie`` may alter each site's answers.

    Attributes:
        sites: by name.
        asked: (site, request) of all that was sent to the sites.
    """

    def __init__(self, n: int, lie: Lie, *, colluders: int = 1) -> None:
        aggregation = f"colluders = {colluders}\nmin_sites = {n}\nclip = 1.0"
        self.study = study(aggregation=aggregation)
        self.names = site_names(n)
        self.asked: list[tuple[str, Message]] = []
        self._lie = lie
        roster = roster_of(self.names)
        policy = SitePolicy(bytes.fromhex(self.study.digest), colluders, n)
        self.sites = {
            name: Site(
                identity=identity_of(name),
                name=name,
                roster=roster,
                policy=policy,
                store=MemoryStore(),
            )
            for name in self.names
        }
        nodes = dict(enumerate(self.names))
        members = Members("run-1", nodes, n, self.names)
        messenger: Any = self
        self._nodes = nodes
        self.collector = SecureCollector(messenger, self.study, members, roster)

    def round(self, number: int) -> Collected:
        """Collect the sites' updates: each coordinate is the site's place among them, over 10."""
        return self.collector.updates(number, np.full(DIMENSION, number, np.float32))

    def stream(
        self, tasks: Mapping[int, RoundMessage], answer: type[Exchanged]
    ) -> Iterator[Reply[Exchanged]]:
        """Stand for the messenger's."""
        for node, task in tasks.items():
            name = self._nodes[node]
            assert isinstance(task, TrainTask | Exchange)
            bundle = decode(task.exchange.data)
            assert isinstance(bundle, Bundle)
            self.asked += [(name, part) for part in bundle.parts]
            given = self._lie(name, [self._one(name, p, task) for p in bundle.parts], bundle.parts)
            if given is None:
                yield Reply(node, Refusal(site="", reason=SILENT, signature=b""))
            else:
                data = Bundle(tuple(given)).encode()
                yield Reply(node, Exchanged(name, task.round, octets(data)))

    def _one(self, name: str, request: Message, task: TrainTask | Exchange) -> Message:
        site = self.sites[name]
        if not isinstance(request, MaskRequest):
            return site.respond(request)
        assert isinstance(task, TrainTask)
        expected = sessions.update_session(
            self.study,
            [name for name, _ in request.session.weights],
            round_number=task.round,
            attempt=request.session.attempt,
            model=task.vector,
        )
        try:
            # One that complained without a ground has masked already.
            known = request.kid in site._epochs and site.has_masked(request.kid)
            complaint = None if known else site.open(request, expected)
            if complaint is not None:
                return complaint
            update = np.full(DIMENSION, self.names.index(name) / 10, np.float32)
            return site.mask(request.kid, update, saturate=True)
        except SecureAggregationError as error:
            return site.abort(request.kid, error)

    def mean(self, names: tuple[str, ...]) -> float:
        """What each coordinate of the mean over these sites is."""
        return float(np.mean([self.names.index(name) / 10 for name in names]))
