"""The product's ClientApp with its noise fixed: for tests alone.

It replaces the source of the keys in the process that serves a message. The wheel has no switch
that does so, and ``tests/unit/client/training/test_csprng.py`` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message

from cloister_fl.client.training import csprng


class SeededClientApp:
    """Serves each message with keys that follow from site, message type, round and ``seed``."""

    def __init__(self, app: Callable[[Message, Context], Message], seed: int = 0) -> None:
        self._app = app
        self._seed = seed

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        meta = message.metadata
        place = f"{self._seed}/{name}/{meta.message_type}/{meta.group_id}"
        before = csprng._fresh_key
        csprng._fresh_key = _keys(place)
        try:
            return self._app(message, context)
        finally:
            csprng._fresh_key = before


def _keys(place: str) -> Callable[[], bytes]:
    count = 0

    def key() -> bytes:
        nonlocal count
        count += 1
        return hashlib.sha256(f"{place}/{count}".encode()).digest()

    return key
