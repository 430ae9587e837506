"""A hospital's node that a test drives by hand, over the coordinator's real fleet port.

It speaks Flower's protocol as the SuperNode does, and sends whatever a test likes: objects that no
library of Flower's would make, and only some of them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as Head
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import Message as Protobuf

from support.coordinator_process import Hospital

FLEET = "/v1/fleet/"
SUPERLINK = 1
BEAT_S = 10.0
AnswerT = TypeVar("AnswerT", bound=Protobuf)


@dataclass
class Sent:
    """What a reply consists of: its head, the tree of its objects, and their contents by id."""

    head: Head
    tree: ObjectTree
    objects: dict[str, bytes] = field(default_factory=dict)

    def with_root(self, content: bytes, children: tuple[ObjectTree, ...] = ()) -> Sent:
        """The same head over another outermost object, whatever that is."""
        identifier = hashlib.sha256(content).hexdigest()
        head = Head()
        head.CopyFrom(self.head)
        head.metadata.message_id = identifier
        tree = ObjectTree(object_id=identifier, children=children)
        return Sent(head, tree, {**self.objects, identifier: content})


def raw(kind: str, children: tuple[str, ...], body: bytes) -> bytes:
    """An object as Flower stores it, of any kind and with any children."""
    parts = (kind, ",".join(children), str(len(body)))
    return HEAD_VALUE_DIVIDER.join(parts).encode() + HEAD_BODY_DIVIDER + body


def identifier_of(content: bytes) -> str:
    """The id of an object."""
    return hashlib.sha256(content).hexdigest()


@dataclass(eq=False)
class HandDrivenNode:
    """A node of an enrolled hospital.

    Attributes:
        hospital: whose certificate and node key it shows.
        node: its id.
    """

    hospital: Hospital
    node: int = 0

    def __post_init__(self) -> None:
        self.node = self.hospital.activate()

    def call(self, path: str, request: Protobuf, answer: type[AnswerT]) -> AnswerT:
        """One request; its answer, which must be one."""
        status, body = self.hospital.post(FLEET + path, request)
        assert status == 200, (path, status, body[:200])
        return answer.FromString(body)

    def beat(self) -> None:
        """Stay online."""
        request = SendNodeHeartbeatRequest(node=ProtoNode(node_id=self.node), heartbeat_interval=30)
        self.hospital.post(FLEET + "send-node-heartbeat", request)

    def asked(self) -> tuple[Head, ObjectTree] | None:
        """The head of the next message, and the tree of its objects; None where there is none."""
        request = PullMessagesRequest(node=ProtoNode(node_id=self.node))
        found = self.call("pull-messages", request, PullMessagesResponse)
        if not found.messages_list:
            return None
        return found.messages_list[0], found.message_object_trees[0]

    def fetch(self) -> Message | None:
        """The next message, whole and confirmed."""
        asked = self.asked()
        if asked is None:
            return None
        head, tree = asked
        contents = {}
        for each in iterate_object_tree(tree):
            contents[each.object_id] = self._object(head.metadata.run_id, each.object_id)
        self.confirm(head.metadata.run_id, head.metadata.message_id)
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return message

    def _object(self, run: int, identifier: str) -> bytes:
        request = PullObjectRequest(
            node=ProtoNode(node_id=self.node), run_id=run, object_id=identifier
        )
        while True:
            found = self.call("pull-object", request, PullObjectResponse)
            assert found.object_found
            if found.object_available:
                return found.object_content
            time.sleep(0.05)

    def confirm(self, run: int, identifier: str) -> tuple[int, bytes]:
        """Say that a message was received: the status and body that come back."""
        request = ConfirmMessageReceivedRequest(
            node=ProtoNode(node_id=self.node), run_id=run, message_object_id=identifier
        )
        return self.hospital.post(FLEET + "confirm-message-received", request)

    def written(self, content: RecordDict, asked: Message, **changes: object) -> Sent:
        """A reply as Flower would write it; ``changes`` of its metadata, in head and object."""
        given = asked.metadata
        fields = {
            "run_id": given.run_id,
            "message_id": "",
            "src_node_id": self.node,
            "dst_node_id": SUPERLINK,
            "reply_to_message_id": given.message_id,
            "group_id": given.group_id,
            "created_at": time.time(),
            "ttl": 3600.0,
            "message_type": given.message_type,
            **changes,
        }
        reply = make_message(metadata=Metadata(**fields), content=content)  # type: ignore[arg-type]
        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = message_to_proto(remove_content_from_message(reply))
        contents = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
        return Sent(head, get_object_tree(reply), contents)

    def send(self, sent: Sent, *, most: int | None = None) -> str:
        """Push a reply, or the head of it and only its first ``most`` objects; the session."""
        run = sent.head.metadata.run_id
        node = ProtoNode(node_id=self.node)
        request = PushMessagesRequest(
            node=node, messages_list=[sent.head], message_object_trees=[sent.tree]
        )
        answer = self.call("push-messages", request, PushMessagesResponse)
        for identifier in list(answer.objects_to_push)[:most]:
            if identifier in sent.objects:
                self.push(run, identifier, sent.objects[identifier], answer.session_id)
        return answer.session_id

    def push(self, run: int, identifier: str, content: bytes, session: str) -> bool:
        """Push one object: whether it was stored."""
        request = PushObjectRequest(
            node=ProtoNode(node_id=self.node),
            run_id=run,
            object_id=identifier,
            object_content=content,
            session_id=session,
        )
        return self.call("push-object", request, PushObjectResponse).stored


Reaction = Callable[[HandDrivenNode, Message], None]
"""What a node does with a message."""


@contextmanager
def driven(reactions: Mapping[HandDrivenNode, Reaction]) -> Iterator[None]:
    """Let nodes answer in the background, each in its own way, until the block ends."""
    over = threading.Event()
    faults: list[BaseException] = []

    def live(node: HandDrivenNode, react: Reaction) -> None:
        try:
            beaten = 0.0
            while not over.is_set():
                if time.monotonic() - beaten > BEAT_S:
                    beaten = time.monotonic()
                    node.beat()
                message = node.fetch()
                if message is None:
                    over.wait(0.05)
                else:
                    react(node, message)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=live, args=pair) for pair in reactions.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if faults:
        raise faults[0]
