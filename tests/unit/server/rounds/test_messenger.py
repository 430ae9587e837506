"""Whose answer a reply is, also where Flower answers for a node that is gone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, Error, Message
from flwr.common.constant import ErrorCode

from cloister_fl.errors import MessageInvalid
from cloister_fl.protocol.round_messages import (
    Prepare,
    Prepared,
    Refusal,
    Refused,
    Update,
    pack,
)
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


class Bounded(InProcessGrid):
    """As the grid of a deployed run: says of one node's reply that it cannot be read."""

    bound = 0

    def bound_replies(self, most_bytes: int) -> None:
        self.bound = most_bytes

    def give_up(self, message_ids: Iterable[str]) -> None:
        """Nothing is half here."""

    def _deliver(self, message: Message) -> Message:
        if message.metadata.dst_node_id == UNKNOWN:
            raise MessageInvalid("A reply cannot be read.")
        return super()._deliver(message)


def _refused(messenger: Messenger) -> dict[int, str]:
    replies = messenger.ask([2, 3, 4], TASK, Prepared)
    return {reply.node: getattr(reply.message, "reason", "yes") for reply in replies}


def test_a_reply_that_cannot_be_read_costs_its_own_node_the_answer() -> None:
    def answers(message: Message, context: object) -> Message:
        return Message(content=pack(Prepared("c", b"", "")), reply_to=message)

    grid = Bounded(answers, [{"site": name} for name in "abc"])
    assert _refused(Messenger(grid)) == {2: "yes", 3: "unreadable", 4: "yes"}


def test_what_reading_a_reply_raises_costs_its_own_node_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An array whose bytes are none, as no honest library makes it."""

    def answers(message: Message, context: object) -> Message:
        content = pack(Prepared("c", b"", ""))
        if message.metadata.dst_node_id == UNKNOWN:
            content = pack(Update("c", 1, np.ones(1, np.float32)))
            array = content.array_records["arrays"]["vector"]
            assert isinstance(array, Array)
            array.data = None  # type: ignore[assignment]
        return Message(content=content, reply_to=message)

    monkeypatch.setattr("copy.deepcopy", lambda each: each)
    grid = InProcessGrid(answers, [{"site": name} for name in "abc"])
    assert _refused(Messenger(grid)) == {2: "yes", 3: "unreadable", 4: "yes"}


def test_an_answer_beyond_the_bound_is_not_read() -> None:
    def answers(message: Message, context: object) -> Message:
        name = "c" * (1000 if message.metadata.dst_node_id == UNKNOWN else 1)
        return Message(content=pack(Prepared(name, b"", "")), reply_to=message)

    grid = Bounded(answers, [{"site": name} for name in "abc"])
    messenger = Messenger(InProcessGrid(answers, [{"site": name} for name in "abc"]))
    messenger.bound_replies(500)
    assert _refused(messenger) == {2: "yes", 3: "unreadable", 4: "yes"}
    Messenger(grid).bound_replies(500)
    assert grid.bound == 500
