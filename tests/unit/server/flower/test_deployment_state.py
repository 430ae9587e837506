"""What Flower's state says of a node that crashed, and of what it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, ErrorCode
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
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

    def ask(self) -> str:
        message = Message(_words("question"), self.node, "query.prepare", group_id="1")
        return str(self._stored(message))

    def fetch(self) -> Message:
        (message,) = self.state.get_message_ins(self.node, 1)
        assert isinstance(message, Message)
        return message

    def answer(self, message: Message) -> None:
        """The head of a reply, of which no part ever follows."""
        self._stored(Message(_words("answer"), reply_to=message))

    def answers(self, *asked: str) -> list[Message]:
        return list(self.state.get_message_res(set(asked), self.run))

    def _stored(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, _ = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
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
