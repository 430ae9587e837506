"""What Flower's state says of a node that crashed, and of what it was asked."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID, ErrorCode
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Metadata, ObjectTree
from flwr.proto.message_pb2 import Message as Head
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.server.flower import superlink
from cloister_fl.server.flower.superlink import build, speaks_for_itself

KEY = b"key"
# Alembic's, of Flower's own migrations.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),
    pytest.mark.long,  # each makes Flower's database
]


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


def test_a_node_whose_key_was_renewed_stays_the_node_that_it_was(link: Link) -> None:
    asked = link.ask()
    link.nodes.reconcile({"hospital": b"new"}, {KEY, b"new"}, {b"new": KEY})
    assert link.state.get_node_id_by_public_key(b"new") == link.node
    assert link.state.get_node_id_by_public_key(KEY) is None
    # What it was asked before is still for it.
    assert link.fetch().metadata.message_id == asked
    # A key of somebody who was shut out meanwhile brings nobody back.
    link.nodes.reconcile({}, {KEY, b"new"}, {b"new": KEY})
    link.nodes.reconcile({"hospital": b"third"}, {b"new", b"third"}, {b"third": b"new"})
    assert link.state.get_node_id_by_public_key(b"third") not in {None, link.node}


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


def _disk(link: Link) -> tuple[int, int]:
    """Bytes of Flower's file and of its log."""
    file = Path(link.nodes._factory.database)
    log = file.with_name(file.name + "-wal")
    return file.stat().st_size, log.stat().st_size if log.exists() else 0


def test_a_finished_run_leaves_no_large_file(link: Link) -> None:
    """Pages of deleted objects stay in the file, and the log stays as long as it was."""
    large = RecordDict({"said": ConfigRecord({"word": bytes(8 << 20)})})
    message = Message(large, link.node, "query.prepare", group_id="1")
    link._stored(message, whole=True)
    link.answer(link.fetch())  # Half a reply, as of a node that the end of a run cut off.
    assert max(_disk(link)) > 8 << 20
    # A run is under way: nothing of it is touched.
    assert link.nodes.shrink()
    assert message.object_id in link.state.object_store
    assert link.state.stop_run(link.run)
    assert sum(_disk(link)) > 8 << 20
    assert link.nodes.shrink()
    file, log = _disk(link)
    assert file < 2 << 20
    assert log == 0
    assert len(link.state.object_store) == 0


def test_no_run_begins_between_the_look_and_the_deletion(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lose what it has sent by then: the file is held before anybody looks."""
    assert link.state.stop_run(link.run)
    held: list[str] = []
    right = type(link.state).get_run_info

    def look(*given: Any, **named: Any) -> Any:
        other = sqlite3.connect(link.nodes._factory.database, timeout=0, isolation_level=None)
        with contextlib.closing(other), pytest.raises(sqlite3.OperationalError) as caught:
            other.execute("BEGIN IMMEDIATE")
        held.append(str(caught.value))
        return right(*given, **named)

    monkeypatch.setattr(type(link.state), "get_run_info", look)
    assert link.nodes.shrink()
    assert held == ["database is locked"]


def test_a_file_that_somebody_holds_is_shrunk_another_time(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert link.state.stop_run(link.run)
    monkeypatch.setattr(superlink, "_LOCKED_S", 0.05)
    holder = sqlite3.connect(link.nodes._factory.database, isolation_level=None)
    holder.execute("BEGIN")
    holder.execute("SELECT count(*) FROM run").fetchone()
    assert not link.nodes.shrink()
    holder.close()
    assert link.nodes.shrink()


def test_a_push_brings_one_reply_with_its_own_objects() -> None:
    """One that is pushed again with another tree would bring objects without end."""

    def push(*trees: str, heads: int = 1) -> bytes:
        head = Head(metadata=Metadata(message_id="a"))
        return PushMessagesRequest(
            messages_list=[head] * heads,
            message_object_trees=[ObjectTree(object_id=tree) for tree in trees],
        ).SerializeToString()

    assert speaks_for_itself(push("a"))
    for wrong in (push("b"), push(), push("a", "a"), push("a", heads=2), push(heads=0), b"\xff"):
        assert not speaks_for_itself(wrong)
