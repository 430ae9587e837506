"""How long a run waits for a site's answer, by how long the answers of this run took so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from statistics import median

LEAST_S = 300.0
"""Seconds that every site has."""
OF_ALL = 10.0
OF_ITS_OWN = 3.0
"""How many times as long as the middle site, and as its own slowest answer, a site may take."""
AGAIN_S = 60.0
"""Seconds that a site has which was silent the last time, once all others have answered."""

AT_ONCE = frozenset(("finish",))
"""Kinds of messages that a site answers without data or computing."""
AT_ONCE_S = 30.0
"""Seconds that it has for them."""


class AnswerTimes:
    """Times of the answers of a run, by kind of message and node.

    The first message of a kind is waited for as long as the run's timeout says. After that a site
    has ten times as long as the middle site took, or three times as long as itself took, and five
    minutes at least; never more than the timeout. The middle one, since fewer than half of the
    sites can move it by a lie.

    Args:
        timeout: seconds at most; None waits for all.
        clock: seconds that only rise.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._slowest: dict[str, dict[int, float]] = {}
        self._silent: set[int] = set()
        self._clock = clock

    def stage(self, kinds: Mapping[int, str]) -> Stage:
        """Begin to wait for the answers of nodes; ``kinds`` says what each was sent."""
        limits = {node: self._limit(node, kind) for node, kind in kinds.items()}
        return Stage(self, dict(kinds), limits, frozenset(self._silent & kinds.keys()), self._clock)

    def own(self, node: int, kind: str) -> float:
        """Seconds that a node's slowest answer to this kind took; zero where it gave none."""
        return self._slowest.get(kind, {}).get(node, 0.0)

    def note(self, node: int, kind: str, seconds: float) -> None:
        """A node answered."""
        self.note_heard(node)
        self._slowest.setdefault(kind, {})[node] = max(seconds, self.own(node, kind))

    def note_heard(self, node: int) -> None:
        """A node answered, if not as it was asked to."""
        self._silent.discard(node)

    def note_silent(self, node: int) -> None:
        """A node did not answer in time."""
        self._silent.add(node)

    def _limit(self, node: int, kind: str) -> float:
        if kind in AT_ONCE:
            return min(self._timeout, AT_ONCE_S)
        known = self._slowest.get(kind)
        if not known or math.isinf(self._timeout):
            return self._timeout
        usual = OF_ALL * median(known.values())
        return min(self._timeout, max(LEAST_S, usual, OF_ITS_OWN * self.own(node, kind)))


class Stage:
    """The wait for one round of answers; made by ``AnswerTimes.stage``."""

    def __init__(
        self,
        times: AnswerTimes,
        kinds: Mapping[int, str],
        limits: Mapping[int, float],
        silent: frozenset[int],
        clock: Callable[[], float],
    ) -> None:
        self._times = times
        self._kinds = kinds
        self._limits = limits
        self._silent = silent
        self._clock = clock
        self._began = clock()
        self._last = 0.0

    def answered(self, node: int, *, counts: bool) -> None:
        """A node answered; ``counts`` where it did what it was asked, so that its time tells."""
        seconds = self._clock() - self._began
        if node not in self._silent:
            self._last = seconds
        if counts:
            self._times.note(node, self._kinds[node], seconds)
        else:
            self._times.note_heard(node)

    def overdue(self, waiting: Collection[int]) -> list[int]:
        """Those of ``waiting`` that are waited for no longer; each is noted as silent."""
        seconds = self._clock() - self._began
        over = [node for node in waiting if seconds >= self._limit(node, waiting)]
        for node in over:
            self._times.note_silent(node)
        return over

    def _limit(self, node: int, waiting: Collection[int]) -> float:
        limit = self._limits[node]
        only_silent = self._silent.issuperset(waiting) and len(self._silent) < len(self._kinds)
        if not only_silent or limit == math.inf:
            return limit
        own = OF_ITS_OWN * self._times.own(node, self._kinds[node])
        return min(limit, max(AGAIN_S, 2 * self._last, own))
