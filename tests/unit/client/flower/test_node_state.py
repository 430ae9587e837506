"""What the node does for an executor that died: it answers, once, whatever was half done."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode, Status
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.client.flower.node import NodeState, RunEnded, _run_ended, guarded
from cloister_fl.protocol.app_bundle import bundle_hash

RUN, NODE, SERVER = 7, 5, 1


class Node:
    """A node's state that has fetched one message, and made a task of it."""

    def __init__(self) -> None:
        self.state: Any = NodeState(ObjectStoreFactory().store())
        self.state.set_node_id(NODE)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER, 1
        self.asked = Message(_words("question"), NODE, "train", group_id="1")
        self.asked.metadata.__dict__["_message_id"] = self.asked.object_id
        self.asked.metadata.__dict__["_run_id"] = RUN
        self.task = self.state.create_task(TaskType.CLIENT_APP, RUN)
        self.state.store_message(self.asked)

    def executor_asks(self) -> None:
        """As AcquireTask does."""
        for task in self.state.get_tasks(statuses=[Status.PENDING]):
            self.state.claim_task(task.task_id)

    def executor_looks(self) -> None:
        """As the executor does once it has the task."""
        assert self.state.activate_task(self.task)
        (found,) = self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        self.state.record_message_processing_start(found.metadata.message_id)

    def executor_answers(self, *, parts: int | None = None) -> Message:
        """Hand a reply over, or some of its parts."""
        reply = Message(_words("answer"), reply_to=self.asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        session = self.state.start_session(RUN)
        stored, missing = self.state.store_message_and_object_tree(
            reply, get_object_tree(reply), session
        )
        assert stored
        for name in missing[:parts]:
            content = get_all_nested_objects(reply)[name].deflate()
            assert self.state.store_object(RUN, session, name, content)
        return reply

    def replies(self) -> list[Message]:
        """What the node would send now."""
        return list(self.state.get_messages_legacy(is_reply=True))


def _words(word: str) -> RecordDict:
    return RecordDict({"said": ConfigRecord({"word": word})})


@pytest.fixture
def node() -> Node:
    return Node()


def _crashed(replies: list[Message]) -> bool:
    return [each.error.code for each in replies] == [ErrorCode.CLIENT_APP_CRASHED]


def test_a_whole_reply_goes(node: Node) -> None:
    node.executor_asks()
    node.executor_looks()
    reply = node.executor_answers()
    assert [each.metadata.message_id for each in node.replies()] == [reply.metadata.message_id]


def test_an_executor_that_died_before_it_began(node: Node) -> None:
    node.executor_asks()
    node.executor_asks()
    assert node.replies() == []
    # The next one has the task.
    node.executor_looks()
    node.executor_answers()
    assert len(node.replies()) == 1


def test_an_executor_that_died_before_it_looked(node: Node) -> None:
    node.executor_asks()
    assert node.state.activate_task(node.task)
    assert node.replies() == []
    node.executor_asks()
    assert _crashed(node.replies())
    assert node.replies() == []


def test_an_executor_that_died_at_work(node: Node) -> None:
    node.executor_asks()
    node.executor_looks()
    node.executor_asks()
    assert _crashed(node.replies())


@pytest.mark.parametrize("parts", [0, 1])
def test_an_executor_that_died_handing_its_reply_over(node: Node, parts: int) -> None:
    node.executor_asks()
    node.executor_looks()
    half = node.executor_answers(parts=parts)
    assert node.replies() == []
    node.executor_asks()
    assert _crashed(node.replies())
    assert half.metadata.message_id not in node.state.object_store


def test_a_reply_is_sent_once_it_is_whole_and_only_then(node: Node) -> None:
    node.executor_asks()
    node.executor_looks()
    reply = Message(_words("answer"), reply_to=node.asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = node.state.start_session(RUN)
    _, missing = node.state.store_message_and_object_tree(reply, get_object_tree(reply), session)
    assert len(missing) > 1
    for name in missing:
        assert node.replies() == []
        content = get_all_nested_objects(reply)[name].deflate()
        assert node.state.store_object(RUN, session, name, content)
    assert len(node.replies()) == 1


def test_a_run_that_ended_while_its_message_was_fetched_is_an_error_like_others() -> None:
    def ended(*_: object) -> None:
        raise RunNotRunningException

    @contextlib.contextmanager
    def connection() -> Any:
        yield (NODE, ended, ended, ended, ended, ended, ended, ended)

    noted: list[int] = []
    with guarded(connection, noted.append)() as (*_, pull, _push, confirm):
        assert noted == [NODE]
        for call in (pull, confirm):
            with pytest.raises(RunEnded):
                call(RUN, bundle_hash())


def test_a_site_is_not_shut_out_because_a_run_ended() -> None:
    ended = FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, "").to_json("ended")
    assert _run_ended(httpx.Response(403, json=ended))
    assert not _run_ended(httpx.Response(403, content=b"certificate-revoked"))
    other = FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "").to_json("no")
    assert not _run_ended(httpx.Response(403, json=other))
    assert not _run_ended(httpx.Response(200, json=ended))
