"""A hospital whose replies are malformed, over the real ports: it declined, and nobody else did.

Real coordinator, TLS and Flower's grid over HTTP; the nodes are driven by hand.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import push_objects

from cloister_fl.protocol.round_messages import (
    Evaluated,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    Update,
    pack,
)
from cloister_fl.server.flower import runtime
from cloister_fl.server.rounds.messenger import Messenger, Reply
from support import coordinator_process
from support.coordinator_process import Running
from support.hand_driven_node import (
    HandDrivenNode,
    Reaction,
    Sent,
    driven,
    identifier_of,
    raw,
)

TASK = Prepare("{}", "run", 3, "", b"", "")
YES = Prepared("north", b"", "")
REFUSED = {"declined", "unreadable"}
HALF_S = 30.0
"""What half a reply is waited for."""


@pytest.fixture(scope="module")
def nodes(
    running: Running, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HandDrivenNode, HandDrivenNode, HandDrivenNode]:
    """Two that are honest, and one that is not."""
    names = ("north", "south", "hostile")
    folder = tmp_path_factory.mktemp("sites")
    north, south, hostile = (
        HandDrivenNode(coordinator_process.join(running, folder / name, name)) for name in names
    )
    return north, south, hostile


Nodes = tuple[HandDrivenNode, HandDrivenNode, HandDrivenNode]


def honest(node: HandDrivenNode, message: Message) -> None:
    node.send(node.written(pack(YES), message))


def ask(
    running: Running,
    nodes: Nodes,
    hostile: Reaction,
    *,
    timeout: float = 120.0,
    answer: type[RoundMessage] = Prepared,
    good: Reaction = honest,
) -> tuple[dict[int, Reply[Any]], float]:
    """Ask all three: what came from each, and after how many seconds."""
    place = running.place
    for node in nodes:
        node.beat()
    with (
        runtime.running(place.socket, place.token(), place.executor_secret()) as (
            grid,
            _,
        ),
        driven(dict(zip(nodes, (good, good, hostile), strict=True))),
    ):
        began = time.monotonic()
        replies = Messenger(grid, timeout=timeout).ask([node.node for node in nodes], TASK, answer)
        return {reply.node: reply for reply in replies}, time.monotonic() - began


# Malformed in one way each


def a_child_that_its_tree_lacks(node: HandDrivenNode, message: Message) -> Sent:
    body = node.written(pack(YES), message)
    return body.with_root(raw("Message", ("0" * 64,), b""))


def an_object_that_is_no_message(node: HandDrivenNode, message: Message) -> Sent:
    return node.written(pack(YES), message).with_root(raw("ConfigRecord", (), b""))


def a_message_without_content(node: HandDrivenNode, message: Message) -> Sent:
    return node.written(pack(YES), message).with_root(raw("Message", (), b""))


def a_message_that_holds_an_array(node: HandDrivenNode, message: Message) -> Sent:
    chunk = ArrayChunk(memoryview(b"x")).deflate()
    array = _array(chunk, [0])
    sent = node.written(pack(YES), message)
    sent.objects |= {identifier_of(each): each for each in (chunk, array)}
    tree = ObjectTree(
        object_id=identifier_of(array), children=[ObjectTree(object_id=identifier_of(chunk))]
    )
    body = sent.head.SerializeToString()
    return sent.with_root(raw("Message", (identifier_of(array),), body), (tree,))


def a_body_that_is_no_protobuf(node: HandDrivenNode, message: Message) -> Sent:
    sent = node.written(pack(YES), message)
    (content,) = sent.tree.children
    return sent.with_root(raw("Message", (content.object_id,), b"\xff" * 64), (content,))


def no_time_of_creation(node: HandDrivenNode, message: Message) -> Sent:
    """A number that is none passes every comparison, and a database keeps it as nothing."""
    sent = node.written(pack(YES), message)
    sent.head.metadata.created_at = float("nan")
    return sent


def no_time_to_live(node: HandDrivenNode, message: Message) -> Sent:
    sent = node.written(pack(YES), message)
    sent.head.metadata.ttl = float("nan")
    return sent


def another_form(node: HandDrivenNode, message: Message) -> Sent:
    records = pack(YES)
    records["more"] = pack(YES)["cloister"]
    return node.written(records, message)


def a_list_nested_a_thousand_deep(node: HandDrivenNode, message: Message) -> Sent:
    """What lists an array's pieces is JSON, of whatever form."""
    return _with_array(node, message, b"[" * 20_000)


def a_piece_that_is_not_there(node: HandDrivenNode, message: Message) -> Sent:
    return _with_array(node, message, json.dumps(_described([7])).encode())


def _with_array(node: HandDrivenNode, message: Message, body: bytes, *, size: int = 3) -> Sent:
    """An update whose array says of itself what a test likes."""
    sent = node.written(pack(Update("hostile", 1, np.ones(size, np.float32))), message)
    records = sent.tree.children[0]
    arrays = next(each for each in records.children if each.children)
    (array,) = arrays.children
    chunk = array.children[0]
    lie = raw("Array", (chunk.object_id,), body)
    tree = ObjectTree(object_id=identifier_of(lie), children=[chunk])
    sent.objects[identifier_of(lie)] = lie
    return _rebuilt(sent, records, arrays, tree)


def _rebuilt(sent: Sent, records: ObjectTree, arrays: ObjectTree, array: ObjectTree) -> Sent:
    """The same reply around another array."""
    listed = raw(
        "ArrayRecord", (array.object_id,), json.dumps({"vector": array.object_id}).encode()
    )
    head = next(each for each in records.children if not each.children)
    children = (identifier_of(listed), head.object_id)
    names = {"arrays": children[0], "cloister": children[1]}
    whole = raw("RecordDict", children, json.dumps(names).encode())
    sent.objects |= {identifier_of(each): each for each in (listed, whole)}
    tree = ObjectTree(
        object_id=identifier_of(whole),
        children=[ObjectTree(object_id=children[0], children=[array]), head],
    )
    body = sent.objects[sent.tree.object_id].partition(b"\0")[2]
    return sent.with_root(raw("Message", (tree.object_id,), body), (tree,))


def _described(pieces: list[int]) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "shape": [3],
        "stype": "cloister.raw",
        "arraychunk_ids": pieces,
    }


def _array(chunk: bytes, pieces: list[int]) -> bytes:
    return raw("Array", (identifier_of(chunk),), json.dumps(_described(pieces)).encode())


LIES: tuple[Callable[[HandDrivenNode, Message], Sent], ...] = (
    a_child_that_its_tree_lacks,
    an_object_that_is_no_message,
    a_message_without_content,
    a_message_that_holds_an_array,
    a_body_that_is_no_protobuf,
    another_form,
    a_list_nested_a_thousand_deep,
    a_piece_that_is_not_there,
)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(each, id=each.__name__, marks=() if number % 3 == 0 else pytest.mark.slow)
        for number, each in enumerate(LIES)
    ],
)
def test_one_malformed_reply_costs_its_own_site_the_answer_and_no_other(
    running: Running, nodes: Nodes, lie: Callable[[HandDrivenNode, Message], Sent]
) -> None:
    north, south, hostile = nodes

    def lies(node: HandDrivenNode, message: Message) -> None:
        node.send(lie(node, message))

    replies, seconds = ask(running, nodes, lies)
    assert set(replies) == {node.node for node in nodes}
    for node in (north, south):
        assert replies[node.node].message == YES
    refusal = replies[hostile.node].message
    assert isinstance(refusal, Refusal)
    assert refusal.reason in REFUSED
    assert seconds < 60


@pytest.mark.parametrize(
    "lie", [no_time_of_creation, pytest.param(no_time_to_live, marks=pytest.mark.slow)]
)
def test_a_time_that_is_no_number_gets_through_no_port(
    running: Running, nodes: Nodes, lie: Callable[[HandDrivenNode, Message], Sent]
) -> None:
    told: list[object] = []

    def lies(node: HandDrivenNode, message: Message) -> None:
        sent = lie(node, message)
        push = PushMessagesRequest(
            node=Node(node_id=node.node),
            messages_list=[sent.head],
            message_object_trees=[sent.tree],
        )
        told.append(
            running.refused(
                lambda: node.hospital.post("/v1/fleet/push-messages", push)[0], "malformed"
            )
        )
        honest(node, message)

    replies, _ = ask(running, nodes, lies)
    assert [replies[node.node].message for node in nodes] == [YES, YES, YES]
    assert told == [400]


def test_a_reply_that_says_it_is_another_s_counts_for_nobody(
    running: Running, nodes: Nodes
) -> None:
    """The head is the hospital's own, and the message under it another hospital's answer."""
    north, south, hostile = nodes
    asked: dict[int, str] = {}

    def waits(node: HandDrivenNode, message: Message) -> None:
        asked[node.node] = message.metadata.message_id
        while hostile.node not in asked:
            time.sleep(0.02)
        time.sleep(1)
        honest(node, message)

    def lies(node: HandDrivenNode, message: Message) -> None:
        while len(asked) < 2:
            time.sleep(0.02)
        theirs = {"src_node_id": north.node, "reply_to_message_id": asked[north.node]}
        forged = node.written(pack(Prepared("forged", b"", "")), message, **theirs)
        own = node.written(pack(YES), message).head
        own.metadata.message_id = forged.head.metadata.message_id
        asked[node.node] = message.metadata.message_id
        node.send(Sent(own, forged.tree, forged.objects))

    replies, _ = ask(running, nodes, lies, good=waits)
    assert [replies[node.node].message for node in (north, south)] == [YES, YES]
    assert isinstance(replies[hostile.node].message, Refusal)


def test_a_histogram_of_another_kind_is_no_answer(running: Running, nodes: Nodes) -> None:
    """It has the agreed form, and is not what was asked for."""
    *_, hostile = nodes

    def other(node: HandDrivenNode, message: Message) -> None:
        node.send(node.written(pack(Evaluated("x", 1, 2, np.zeros(4, np.int64))), message))

    replies, _ = ask(running, nodes, other)
    refusal = replies[hostile.node].message
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "declined"


# What a node says that it has received


def test_a_premature_confirmation_deletes_nothing(running: Running, nodes: Nodes) -> None:
    """A message of which parts are missing, another hospital's, and a reply of one's own."""
    north, _, hostile = nodes
    for node in nodes:
        node.beat()
    place = running.place
    with runtime.running(place.socket, place.token(), place.executor_secret()) as (
        grid,
        _,
    ):
        message = Message(pack(TASK), dst_node_id=hostile.node, message_type="query.prepare")
        message.metadata.__dict__["_message_id"] = asked = message.object_id
        run = message.metadata.run_id
        begun = grid._runtime_client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
            )
        )

        def early(node: HandDrivenNode, identifier: str) -> None:
            told = running.refused(lambda: node.confirm(run, identifier), "confirmed-early")
            assert told == (409, b"confirmed-early")

        early(hostile, asked)
        head = hostile.asked()
        assert head is not None
        assert head[0].metadata.message_id == asked
        early(hostile, asked)
        push_objects(
            dict(get_all_nested_objects(message)),
            make_push_object_fn_protobuf(
                grid._runtime_client.PushObject, grid.node, run, begun.session_id
            ),
        )
        early(north, asked)
        sent = hostile.written(pack(YES), message)
        hostile.send(sent)
        early(hostile, sent.head.metadata.message_id)
        assert [hostile.confirm(run, asked)[0] for _ in range(2)] == [200, 200]
        (reply,) = grid.pull_messages([asked])
        assert not reply.has_error()
    site = [line.get("site") for line in running.refusals() if line["code"] == "confirmed-early"]
    assert set(site) == {"north", "hostile"}


# A reply begun and not finished, and a node that says nothing


@pytest.mark.slow
def test_half_a_reply_and_a_silent_node_cost_the_timeout_and_no_other_the_answer(
    running: Running, nodes: Nodes
) -> None:
    north, south, hostile = nodes
    came: dict[int, float] = {}
    half: list[tuple[Sent, str]] = []

    def begins(node: HandDrivenNode, message: Message) -> None:
        # Of other words than the others': parts that are here already would not be asked for.
        sent = node.written(pack(Prepared("hostile", b"", "")), message)
        half.append((sent, node.send(sent, most=1)))

    place = running.place
    for node in nodes:
        node.beat()
    silent: Reaction = lambda *_: None  # noqa: E731
    with (
        runtime.running(place.socket, place.token(), place.executor_secret()) as (
            grid,
            _,
        ),
        driven({north: honest, south: silent, hostile: begins}),
    ):
        messenger, began = Messenger(grid, timeout=HALF_S), time.monotonic()
        reasons = {}
        for reply in messenger.stream(dict.fromkeys((n.node for n in nodes), TASK), Prepared):
            came[reply.node] = time.monotonic() - began
            reasons[reply.node] = getattr(reply.message, "reason", "yes")
        assert reasons == {north.node: "yes", south.node: "silent", hostile.node: "silent"}
        assert came[north.node] < min(came[south.node], came[hostile.node])
        # Flower itself waits three minutes for the next part, and all others with it.
        assert max(came.values()) < 4 * HALF_S
        # What had come of it is gone, and no more of it is taken.
        (sent, session), run = half[0], half[0][0].head.metadata.run_id
        root = sent.tree.object_id
        assert not hostile.push(run, root, sent.objects[root], session)


# Larger than the study allows


def _update(node: HandDrivenNode, message: Message, size: int) -> Sent:
    return node.written(pack(Update("x", 1, np.ones(size, np.float32))), message)


def an_update_of_another_network(node: HandDrivenNode, message: Message) -> Sent:
    return _update(node, message, 2 << 20)


def one_piece_thirty_thousand_times(node: HandDrivenNode, message: Message) -> Sent:
    """One piece of 64 KiB, of which an array of 2 GB is to be built."""
    body = json.dumps(_described([0] * 30_000), separators=(",", ":")).encode()
    return _with_array(node, message, body, size=1 << 14)


def a_record_of_many_values(node: HandDrivenNode, message: Message) -> Sent:
    """A library's objects of it would take thirty times as much."""
    records = pack(YES)
    records["cloister"] = ConfigRecord({f"{number:06}": number for number in range(10_000)})
    return node.written(records, message)


LARGE = (
    an_update_of_another_network,
    one_piece_thirty_thousand_times,
    a_record_of_many_values,
)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(each, id=each.__name__, marks=pytest.mark.slow if number else ())
        for number, each in enumerate(LARGE)
    ],
)
def test_a_reply_beyond_the_study_s_bound_costs_its_own_site_the_answer(
    running: Running, nodes: Nodes, lie: Callable[[HandDrivenNode, Message], Sent]
) -> None:
    north, south, hostile = nodes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def lies(node: HandDrivenNode, message: Message) -> None:
        node.send(lie(node, message))

    replies, _ = ask(running, nodes, lies)
    assert [replies[node.node].message for node in (north, south)] == [YES, YES]
    assert getattr(replies[hostile.node].message, "reason", "") == "unreadable"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def test_one_reply_brings_no_objects_without_end(running: Running, nodes: Nodes) -> None:
    """One reply again and again, each time with other parts."""
    told: list[object] = []

    def lies(node: HandDrivenNode, message: Message) -> None:
        sent = node.written(pack(YES), message)
        for number in range(3):
            push = PushMessagesRequest(
                node=Node(node_id=node.node),
                messages_list=[sent.head],
                message_object_trees=[ObjectTree(object_id=identifier_of(b"%d" % number))],
            )
            told.append(
                running.refused(
                    lambda push=push: node.hospital.post("/v1/fleet/push-messages", push)[0],
                    "other-node-name",
                )
            )
        node.send(sent)

    replies, _ = ask(running, nodes, lies)
    assert [replies[node.node].message for node in nodes] == [YES, YES, YES]
    assert told == [403, 403, 403]
