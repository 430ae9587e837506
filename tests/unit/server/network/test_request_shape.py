"""Bodies of the Fleet API, judged before they are parsed: Flower's own fit, and few others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.server.coordinator.rejection_log import Refused
from cloister_fl.server.network.request_shape import (
    LARGEST,
    PIECE_BYTES,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    SHAPES,
    TREE_NODES,
    RequestShapes,
)

NODE = Node(node_id=2**64 - 1)
RUN = 2**64 - 1
ID = "0123456789abcdef" * 4
SESSION = "01234567-89ab-cdef-0123-456789abcdef"
HONEST: dict[str, Any] = {
    "/v1/fleet/activate-node": ActivateNodeRequest(public_key=bytes(215), heartbeat_interval=30),
    "/v1/fleet/deactivate-node": DeactivateNodeRequest(node_id=RUN),
    "/v1/fleet/send-node-heartbeat": SendNodeHeartbeatRequest(node=NODE, heartbeat_interval=30),
    "/v1/fleet/pull-messages": PullMessagesRequest(node=NODE),
    "/v1/fleet/get-run": GetRunRequest(node=NODE, run_id=RUN),
    "/v1/fleet/get-fab": GetFabRequest(node=NODE, hash_str=ID, run_id=RUN),
    PUSH_OBJECT: PushObjectRequest(
        node=NODE, run_id=RUN, object_id=ID, object_content=bytes(PIECE_BYTES), session_id=SESSION
    ),
    "/v1/fleet/pull-object": PullObjectRequest(node=NODE, run_id=RUN, object_id=ID),
    "/v1/fleet/confirm-message-received": ConfirmMessageReceivedRequest(
        node=NODE, run_id=RUN, message_object_id=ID
    ),
}


def judge(path: str, body: Any, update_bytes: int = 0) -> Refused | None:
    data = body if isinstance(body, bytes) else body.SerializeToString()
    return RequestShapes(lambda: update_bytes).refusal(path, data)


def push(message: Message) -> PushMessagesRequest:
    """What Flower's node sends of a reply."""
    message.metadata.__dict__["_message_id"] = message.object_id
    tree = get_object_tree(message)
    bare = message_to_proto(message)
    if message.has_content():
        message.content = RecordDict()
        bare = message_to_proto(message)
    return PushMessagesRequest(
        node=NODE, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[1.5]
    )


def reply(pieces: int = 1) -> PushMessagesRequest:
    """A reply with an array of so many pieces, as ``round_messages.pack`` lays it out."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 2**64 - 2, RUN
    asked = Message(RecordDict(), 7, "query.prepare", group_id="1000")
    asked.metadata.__dict__["_message_id"] = ID
    size = PIECE_BYTES if pieces > 1 else 100
    data = b"".join(bytes([number]) * size for number in range(pieces))
    body = Array("uint8", (len(data),), "cloister.raw", data)
    head = ConfigRecord({"kind": "exchanged"})
    content = RecordDict({"arrays": ArrayRecord({"vector": body}), "cloister": head})
    return push(Message(content, reply_to=asked))


def test_every_path_has_an_honest_body() -> None:
    assert set(HONEST) | {PUSH_MESSAGES} == set(SHAPES)


@pytest.mark.parametrize("path", HONEST)
def test_what_a_node_sends_fits(path: str) -> None:
    body = HONEST[path].SerializeToString()
    assert judge(path, body) is None
    assert len(body) <= RequestShapes(lambda: 0).largest(path)


def test_a_reply_fits() -> None:
    assert judge(PUSH_MESSAGES, reply()) is None


def test_a_reply_that_is_an_error_fits() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 2**64 - 2, RUN
    asked = Message(RecordDict(), 7, "train", group_id="1")
    asked.metadata.__dict__["_message_id"] = ID
    assert judge(PUSH_MESSAGES, push(Message(Error(3, "gone"), reply_to=asked))) is None


def test_a_tree_has_the_nodes_of_an_update_and_sixteen() -> None:
    """An update of 60 MiB: twelve pieces, which are all different objects or one many times."""
    size = 12 * PIECE_BYTES
    pushed = reply(12)
    assert judge(PUSH_MESSAGES, pushed, update_bytes=size) is None
    assert judge(PUSH_MESSAGES, pushed) == Refused.OBJECTS_TOO_MANY
    for more, verdict in ((11, None), (12, Refused.OBJECTS_TOO_MANY)):
        wide = PushMessagesRequest()
        wide.CopyFrom(reply())
        tree = ObjectTree(object_id=ID, children=[ObjectTree(object_id=ID)] * (TREE_NODES + more))
        wide.message_object_trees[0].CopyFrom(tree)
        assert judge(PUSH_MESSAGES, wide, update_bytes=size) == verdict


def test_an_update_of_four_gibibytes_fits_in_the_largest_body() -> None:
    tree = ObjectTree(object_id=ID, children=[ObjectTree(object_id=ID)] * 820)
    assert len(tree.SerializeToString()) + 1024 < LARGEST[PUSH_MESSAGES]


def _change(change: Callable[[PushMessagesRequest], object]) -> PushMessagesRequest:
    made = reply()
    change(made)
    return made


def _deep() -> ObjectTree:
    tree = ObjectTree(object_id=ID)
    for _ in range(12):
        tree = ObjectTree(object_id=ID, children=[tree])
    return tree


HOSTILE: dict[str, Callable[[PushMessagesRequest], object]] = {
    "no message": lambda r: r.ClearField("messages_list"),
    "no tree": lambda r: r.ClearField("message_object_trees"),
    "no node": lambda r: r.ClearField("node"),
    "two messages": lambda r: r.messages_list.append(r.messages_list[0]),
    "two trees": lambda r: r.message_object_trees.append(r.message_object_trees[0]),
    "many times": lambda r: r.clientapp_runtime_list.extend([1.0] * 1000),
    "content": lambda r: r.messages_list[0].content.items.add(),
    "an id with a line of its own": lambda r: setattr(
        r.messages_list[0].metadata, "message_id", "a\n\x1b[31mWARNING" + "a" * 48
    ),
    "a type with a line of its own": lambda r: setattr(
        r.messages_list[0].metadata, "message_type", "train\n\x1b[31m"
    ),
    "a group of a megabyte": lambda r: setattr(
        r.messages_list[0].metadata, "group_id", "1" * (1 << 20)
    ),
    "an error of a megabyte": lambda r: setattr(
        r.messages_list[0].error, "reason", "x" * (1 << 20)
    ),
    "a time that is none": lambda r: setattr(r.messages_list[0].metadata, "created_at", math.nan),
    "a life without end": lambda r: setattr(r.messages_list[0].metadata, "ttl", math.inf),
    "less than no time": lambda r: r.clientapp_runtime_list.__setitem__(0, -1.0),
    "a nameless node": lambda r: r.message_object_trees[0].children.add(),
    "a deep tree": lambda r: r.message_object_trees[0].CopyFrom(_deep()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_push_that_no_node_sends(name: str) -> None:
    assert judge(PUSH_MESSAGES, _change(HOSTILE[name])) == Refused.MALFORMED


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize(
    "more",
    [b"\xf8\x07\x01", b"\x0a\x00\x0a\x00", b"\x0b\x0c", b"\x0a\x05a", b"\x80" * 11, b"\x09a"],
    ids=["unknown field", "twice", "group", "cut short", "endless number", "cut double"],
)
def test_other_bytes_than_a_node_sends(path: str, more: bytes) -> None:
    honest = HONEST[path] if path in HONEST else reply()
    assert judge(path, honest.SerializeToString() + more) == Refused.MALFORMED


@pytest.mark.parametrize(
    ("path", "pair"),
    [
        (PUSH_MESSAGES, b"\x12\x00"),
        (PUSH_OBJECT, b"\x0a\x00"),
        ("/v1/fleet/pull-messages", b"\x12\x00"),
        ("/v1/fleet/send-node-heartbeat", b"\x0a\x00"),
    ],
)
def test_a_body_of_empty_fields_is_left_at_once(path: str, pair: bytes) -> None:
    """Millions cost no more than two: the walk ends at the second."""
    body = pair * (5 << 20)
    began = time.thread_time()
    assert judge(path, body) == Refused.MALFORMED
    assert time.thread_time() - began < 0.05


def test_a_wide_tree_is_left_at_its_first_node_too_many() -> None:
    child = b"\x12\x00" * 30_000
    tree = b"\x0a\x40" + ID.encode() + child
    size = len(tree)
    prefix = b"\x1a" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
    began = time.thread_time()
    assert judge(PUSH_MESSAGES, prefix + tree) == Refused.OBJECTS_TOO_MANY
    assert time.thread_time() - began < 0.05


def test_another_path_fits_nothing() -> None:
    assert judge("/v1/fleet/register-node", b"") is None
    assert judge("/v1/fleet/register-node", b"\x0a\x01a") == Refused.MALFORMED
