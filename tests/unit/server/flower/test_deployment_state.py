"""What Flower's state says of a node that crashed, and of what it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.server.flower.superlink import build

KEY = b"key"
# Alembic's, of Flower's own migrations.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")


class Link:
    """Flower's state with one node online and one run; asks the node as a run does."""

    def __init__(self, folder: Path) -> None:
        _, self.nodes = build(folder / "flower.sqlite", "token", b"secret")
        self.nodes.reconcile({"hospital": KEY}, {KEY})
        self.state: Any = self.nodes._factory.state()
        self.node = self.state.get_node_id_by_public_key(KEY)
        assert self.state.activate_node(self.node, 30)
        self.run = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run, 1, 1

    def ask(self, *, whole: bool = False) -> str:
        message = Message(_words("question"), self.node, "query.prepare", group_id="1")
        return str(self._stored(message, whole=whole))

    def fetch(self) -> Message:
        (message,) = self.state.get_message_ins(self.node, 1)
        assert isinstance(message, Message)
        return message

    def answer(self, message: Message) -> None:
        """The head of a reply, of which no part ever follows."""
        self._stored(Message(_words("answer"), reply_to=message))

    def answers(self, *asked: str) -> list[Message]:
        return list(self.state.get_message_res(set(asked), self.run))

    def may_confirm(self, message: str, *, node: int = 0, key: bytes = KEY) -> bool:
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=node or self.node), run_id=self.run, message_object_id=message
        )
        return self.nodes.may_confirm(key, request.SerializeToString())

    def _stored(self, message: Message, *, whole: bool = False) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, _ = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
        for name, each in get_all_nested_objects(message).items():
            assert not whole or self.state.store_object(self.run, session, name, each.deflate())
        return message.metadata.message_id


def _words(word: str) -> RecordDict:
    return RecordDict({"said": ConfigRecord({"word": word})})


@pytest.fixture
def link(tmp_path: Path) -> Link:
    return Link(tmp_path)


def test_a_node_that_begins_anew_is_answered_for_though_nobody_saw_it_gone(link: Link) -> None:
    delivered = link.ask()
    link.fetch()
    waiting = link.ask()
    assert link.answers(delivered) == []
    link.nodes.begins(KEY)
    assert link.state.activate_node(link.node, 30)
    (reply,) = link.answers(delivered)
    assert reply.has_error()
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert reply.metadata.reply_to_message_id == delivered
    # What its last life never saw is for the new one.
    assert link.answers(waiting) == []
    assert link.fetch().metadata.message_id == waiting


def test_half_a_reply_of_its_last_life_is_none(link: Link) -> None:
    asked = link.ask()
    link.answer(link.fetch())
    link.nodes.begins(KEY)
    assert link.state.activate_node(link.node, 30)
    (reply,) = link.answers(asked)
    assert reply.has_error()


def test_a_whole_reply_of_its_last_life_stays(link: Link) -> None:
    asked = link.ask()
    message = link.fetch()
    reply = Message(_words("answer"), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    link.state._store_generated_message(reply)
    assert link.state.store_message_res(reply)
    link.nodes.begins(KEY)
    assert link.state.activate_node(link.node, 30)
    (found,) = link.answers(asked)
    assert not found.has_error()


def test_no_other_node_is_answered_for(link: Link) -> None:
    asked = link.ask()
    link.fetch()
    link.nodes.reconcile({"hospital": KEY, "other": b"other"}, {KEY, b"other"})
    link.nodes.begins(b"other")
    assert link.answers(asked) == []


def test_nothing_is_said_of_a_key_that_no_node_has(link: Link) -> None:
    asked = link.ask()
    link.fetch()
    link.nodes.begins(b"another key")
    assert link.answers(asked) == []


def test_a_message_is_confirmed_once_it_is_whole_and_not_before(link: Link) -> None:
    """Flower deletes what is named: what is still being sent would be gone, and its sender fail."""
    part = link.ask()
    link.fetch()
    assert not link.may_confirm(part)
    whole = link.ask(whole=True)
    assert not link.may_confirm(whole)  # Nobody has fetched it.
    link.fetch()
    assert link.may_confirm(whole)
    link.state.object_store.delete(whole)
    assert link.may_confirm(whole)  # Once more: there is nothing left to delete.


def test_what_is_no_message_to_the_node_is_not_confirmed(link: Link) -> None:
    asked = link.ask(whole=True)
    message = link.fetch()
    link.nodes.reconcile({"hospital": KEY, "other": b"other"}, {KEY, b"other"})
    other = link.state.get_node_id_by_public_key(b"other")
    assert not link.may_confirm(asked, node=other, key=b"other")
    assert not link.may_confirm(asked, node=other)
    assert not link.may_confirm(asked, key=b"unknown")
    reply = Message(_words("answer"), reply_to=message)
    assert not link.may_confirm(link._stored(reply, whole=True))  # Its own, and not to it.
    part = next(name for name in get_all_nested_objects(message) if name != asked)
    assert not link.may_confirm(part)
    assert not link.nodes.may_confirm(KEY, b"\xff")
