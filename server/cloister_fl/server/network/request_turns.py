"""Turns of requests: how many of one site's requests are worked on at a time, by path.

Each path has turns of its own, so a site whose pushes wait for each other still has its heartbeats
answered, and no site takes more of the engine's threads than its turns. Who waits has sent a whole
body already, and those are limited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

ONE = 1
WIDE: Mapping[str, int] = {"/v1/fleet/push-object": 4, "/v1/fleet/pull-object": 4}
"""Paths with more turns than one: a node moves the pieces of a vector two at a time."""


class Turns:
    """The turns of all sites."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], asyncio.Semaphore] = {}

    def of(self, site: str, path: str) -> asyncio.Semaphore:
        """What a request holds while it is worked on.

        Args:
            site: the name of an enrolled site, so there are as many as the federation has.
            path: one of the paths that a node may ask for.
        """
        key = (site, path)
        if key not in self._turns:
            self._turns[key] = asyncio.Semaphore(WIDE.get(path, ONE))
        return self._turns[key]
