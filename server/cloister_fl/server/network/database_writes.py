"""Writes to the coordinator's database by the loop that serves all ports.

SQLite waits for another program's write in the thread that asks, and while that is the loop's, no
hospital is answered. So nothing is waited for there: a write that meets another is tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from cloister_fl.errors import DeploymentError, ServerFolderInvalid
from cloister_fl.server.coordinator.site_database import Registry

WAIT_S = 10.0
"""Seconds after which a write is given up; a command waits as long."""
AGAIN_S = 0.1

Result = TypeVar("Result")


async def written(registry: Registry, write: Callable[[], Result]) -> Result:
    """The result of a write, once no other program holds the database; others are served meanwhile.

    Args:
        registry: the database.
        write: one transaction; it is called again where it could not begin.

    Raises:
        ServerFolderInvalid: another program holds the database for too long, or it cannot be used.
    """
    end = time.monotonic() + WAIT_S
    while True:
        try:
            with registry.waiting(0):
                return write()
        except DeploymentError as error:
            if error.code != ServerFolderInvalid.code or time.monotonic() >= end:
                raise
        await asyncio.sleep(AGAIN_S)
