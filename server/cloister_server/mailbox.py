"""Typed messages over a Flower ``Grid``: who is there, send one task to each, collect replies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic

from flwr.app import Message
from flwr.serverapp import Grid

from cloister_common.errors import MessageInvalid
from cloister_common.records import (
    MessageT,
    Refusal,
    Refused,
    RoundMessage,
    pack,
    payload_bytes,
    unpack,
)

TYPES: Mapping[str, str] = {"prepare": "query.prepare", "train": "train", "evaluate": "evaluate"}
"""Flower's message type for each kind of task."""


@dataclass(frozen=True)
class Reply(Generic[MessageT]):
    """What came back from one node.

    Attributes:
        node: Flower's id of the node.
        message: the typed answer, or a refusal. A node that failed, or that answered outside
            the agreed form, counts as one that declined.
        size: bytes of payload that left the site.
    """

    node: int
    message: MessageT | Refusal
    size: int


class Mailbox:
    """The rounds' view of the federation.

    Args:
        grid: Flower's grid, whichever engine stands behind it.
        timeout: seconds after which a round goes on without those who have not answered;
            None waits for all.
    """

    def __init__(self, grid: Grid, *, timeout: float | None = None) -> None:
        self._grid = grid
        self._timeout = timeout

    def wait_for_nodes(self, count: int, *, seconds: float = 120.0) -> list[int]:
        """Return the nodes online, as soon as there are ``count`` or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= count or time.monotonic() > deadline:
                return nodes
            time.sleep(0.2)

    def ask(
        self, nodes: Iterable[int], task: RoundMessage, answer: type[MessageT]
    ) -> list[Reply[MessageT]]:
        """Send ``task`` to each node and return the replies in the order of the node ids."""
        messages = [
            Message(
                content=pack(task),
                dst_node_id=node,
                message_type=TYPES[task.kind],
                group_id=str(getattr(task, "round", 0)),
            )
            for node in nodes
        ]
        replies = self._grid.send_and_receive(messages, timeout=self._timeout)
        read = [_read(reply, answer) for reply in replies]
        return sorted(read, key=lambda reply: reply.node)


def _read(reply: Message, answer: type[MessageT]) -> Reply[MessageT]:
    node = reply.metadata.src_node_id
    declined = Refusal(site="", reason=Refused.DECLINED.value)
    if reply.has_error():
        return Reply(node, declined, 0)
    size = payload_bytes(reply.content)
    message: MessageT | Refusal
    try:
        message = unpack(reply.content, answer)
    except MessageInvalid:
        try:
            message = unpack(reply.content, Refusal)
        except MessageInvalid:
            message = declined
    return Reply(node, message, size)
