"""Whose answer a reply is, also where Flower answers for a node that is gone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from cloister_fl.protocol.round_messages import Prepare, Prepared, Refusal, Refused, pack
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.messenger import Messenger

TASK = Prepare("{}", "run", 2, "", b"", "")
GONE, UNKNOWN = 2, 3


class Engine(InProcessGrid):
    """As Flower's server: answers in its own name for one node, and does not take another's."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        ids = super().push_messages(asked)
        pairs = zip(ids, asked, strict=True)
        return ["" if each.metadata.dst_node_id == UNKNOWN else name for name, each in pairs]

    def _deliver(self, message: Message) -> Message:
        if message.metadata.dst_node_id != GONE:
            return super()._deliver(message)
        reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply


@pytest.fixture
def messenger() -> Messenger:
    def answers(message: Message, context: object) -> Message:
        return Message(content=pack(Prepared("c", b"", "")), reply_to=message)

    return Messenger(Engine(answers, [{"site": name} for name in "abc"]))


def test_a_node_that_is_gone_or_unknown_declines(messenger: Messenger) -> None:
    replies = messenger.ask([2, 3, 4], TASK, Prepared)
    declined = Refusal(site="", reason=Refused.DECLINED.value, signature=b"")
    assert [(reply.node, reply.message) for reply in replies[:2]] == [(2, declined), (3, declined)]
    assert replies[2].node == 4
    assert isinstance(replies[2].message, Prepared)


class Full(InProcessGrid):
    """As Flower's, which takes nothing of what is too much for it."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return []


def test_what_flower_does_not_take_is_declined() -> None:
    def never(message: Message, context: object) -> Message:
        raise AssertionError

    replies = Messenger(Full(never, [{"site": "a"}, {"site": "b"}])).ask([2, 3], TASK, Prepared)
    assert [reply.node for reply in replies] == [2, 3]
    assert all(isinstance(reply.message, Refusal) for reply in replies)
