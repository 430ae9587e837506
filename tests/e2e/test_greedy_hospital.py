"""An enrolled hospital that asks for more than its share, at the real port of a real server.

It has a certificate and a node, and a message to answer. Whatever it sends, the other hospital's
heartbeats are answered within two seconds, and the server's memory stays.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as Reply
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from cloister_fl.server.flower import runtime
from support import coordinator_process
from support.coordinator_process import Hospital, Running, wait_for

PUSH = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
BEAT = "/v1/fleet/send-node-heartbeat"
SOON_S = 2.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def greedy(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return coordinator_process.join(running, tmp_path_factory.mktemp("greedy"), "greedy")


@pytest.fixture(scope="module")
def honest(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return coordinator_process.join(running, tmp_path_factory.mktemp("honest"), "honest")


class Beats:
    """The honest hospital's heartbeats, one after the other, while something else goes on."""

    def __init__(self, hospital: Hospital) -> None:
        self._hospital = hospital
        self._node = hospital.activate()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest, self.count = 0.0, 0

    def __enter__(self) -> Beats:
        self._thread.start()
        wait_for(lambda: self.count > 0, 30, lambda: "no heartbeat")
        self.slowest = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        request = SendNodeHeartbeatRequest(node=Node(node_id=self._node), heartbeat_interval=30)
        with contextlib.closing(self._hospital.connect()) as line:
            while not self._end.is_set():
                began = time.monotonic()
                assert self._hospital.post(BEAT, request, connection=line)[0] == 200
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.count += 1
                time.sleep(0.05)


@pytest.fixture
def asked(running: Running, greedy: Hospital) -> Iterator[Reply]:
    """A message of a run, as the greedy hospital has fetched it."""
    node, place = greedy.activate(), running.place
    with runtime.running(place.socket, place.token(), place.executor_secret()) as (
        grid,
        _,
    ):
        content = RecordDict({"said": ConfigRecord({"word": "question"})})
        list(grid.push_messages([Message(content, node, "query.prepare", group_id="1")]))
        request = PullMessagesRequest(node=Node(node_id=node))
        status, body = greedy.post("/v1/fleet/pull-messages", request)
        assert status == 200
        yield PullMessagesResponse.FromString(body).messages_list[0]


def _push(asked: Reply, children: int, root: str = "0" * 64) -> PushMessagesRequest:
    """The head of a reply, with so many objects that are to follow."""
    metadata = asked.metadata
    made = Metadata(
        run_id=metadata.run_id,
        message_id=root,
        src_node_id=metadata.dst_node_id,
        dst_node_id=metadata.src_node_id,
        reply_to_message_id=metadata.message_id,
        group_id=metadata.group_id,
        message_type=metadata.message_type,
        ttl=60.0,
        created_at=time.time(),
        src_task_id=metadata.dst_task_id,
        dst_task_id=metadata.src_task_id,
    )
    reply = Reply(metadata=made)
    reply.content.SetInParent()
    tree = ObjectTree(
        object_id=root,
        children=[ObjectTree(object_id=f"{number:064x}") for number in range(1, children + 1)],
    )
    return PushMessagesRequest(
        node=Node(node_id=metadata.dst_node_id),
        messages_list=[reply],
        message_object_trees=[tree],
        clientapp_runtime_list=[1.0],
    )


def test_an_honest_reply_is_taken(running: Running, greedy: Hospital, asked: Reply) -> None:
    status, body = greedy.post(PUSH, _push(asked, 5))
    assert status == 200
    assert len(PushMessagesResponse.FromString(body).objects_to_push) == 6


@pytest.mark.parametrize(
    ("children", "status", "code"),
    [(5000, 413, "body-too-large"), (800, 413, "objects-too-many")],
    ids=["340 kB", "54 kB"],
)
def test_a_tree_of_many_nodes_stops_nobody(
    running: Running,
    greedy: Hospital,
    honest: Hospital,
    asked: Reply,
    children: int,
    status: int,
    code: str,
) -> None:
    """Flower writes them all in one transaction, for which every other request waits."""
    pushed = _push(asked, children)

    def act() -> int:
        # What is too large is not read to its end, and the connection may be gone with the answer.
        with contextlib.suppress(ssl.SSLError, ConnectionError, HTTPException):
            return greedy.post(PUSH, pushed)[0]
        return status

    with Beats(honest) as beats:
        began = time.monotonic()
        assert running.refused(act, code) == status
        assert time.monotonic() - began < SOON_S
    assert beats.slowest < SOON_S


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        (PUSH, b"\x12\x00" * (31 * MIB), "body-too-large"),
        (PUSH, b"\x12\x00" * (32 << 10), "malformed"),
        (PUSH_OBJECT, b"\x0a\x00" * (31 * MIB), "body-too-large"),
        (PUSH_OBJECT, b"\x0a\x00" * (5 * MIB // 2), "malformed"),
        ("/v1/fleet/pull-messages", b"\x12\x00" * (MIB // 2), "body-too-large"),
        (BEAT, b"\x0a\x00" * (MIB // 2), "body-too-large"),
    ],
    ids=["62 MiB", "64 KiB", "62 MiB of an object", "5 MiB of an object", "pull", "heartbeat"],
)
def test_a_body_that_a_parser_blows_up(
    running: Running, greedy: Hospital, honest: Hospital, path: str, body: bytes, code: str
) -> None:
    """62 MiB of two bytes each took 1.9 GiB and 28 s."""
    greedy.activate()
    before = running.rss()
    largest = 0

    def act() -> None:
        nonlocal largest
        # The server answers, and closes, before all of it is sent.
        with contextlib.suppress(ssl.SSLError, ConnectionError, HTTPException):
            greedy.post(path, body)
        largest = running.rss()

    with Beats(honest) as beats:
        began = time.monotonic()
        running.refused(act, code)
        assert time.monotonic() - began < 5
    assert beats.slowest < SOON_S
    assert largest - before < 100 * MIB


def test_a_wrong_signature_is_refused_before_the_body_comes(
    running: Running, greedy: Hospital
) -> None:
    greedy.activate()

    def act() -> int:
        with contextlib.closing(greedy.connect()) as line:
            line.putrequest("POST", PUSH)
            for name, value in {**greedy.headers(), "flwr-signature": "AAAA"}.items():
                line.putheader(name, value)
            line.putheader("content-length", "1000")
            line.endheaders()
            line.sock.settimeout(10)
            return line.getresponse().status

    assert running.refused(act, "signature-invalid") == 401


@pytest.mark.parametrize("stamp", ["", "yesterday", "2020-01-01T00:00:00+00:00", "9" * 500])
def test_a_time_that_is_not_now(running: Running, greedy: Hospital, stamp: str) -> None:
    greedy.activate()
    headers = {**greedy.headers(), "flwr-timestamp": stamp}

    def act() -> int:
        return greedy.post(BEAT, b"", headers)[0]

    assert running.refused(act, "signature-invalid") == 401


def test_a_stranger_s_signature_ends_no_life_of_a_node(
    running: Running, greedy: Hospital, asked: Reply
) -> None:
    """What was delivered to a node is answered for when it begins anew, and not when asked to."""
    request = ActivateNodeRequest(public_key=greedy.node_key, heartbeat_interval=30)
    wrong = {**greedy.headers(), "flwr-signature": "AAAA"}

    def act() -> int:
        return greedy.post("/v1/fleet/activate-node", request, wrong)[0]

    assert running.refused(act, "signature-invalid") == 401
    # The reply still finds its message, and the node its place.
    status, body = greedy.post(PUSH, _push(asked, 1, "f" * 64))
    assert status == 200
    assert len(PushMessagesResponse.FromString(body).objects_to_push) == 2


@pytest.mark.slow
def test_nothing_that_a_hospital_writes_reaches_the_output(
    running: Running, greedy: Hospital, asked: Reply
) -> None:
    """Also not where Flower complains of it; a thousand complaints are some lines."""
    node = greedy.activate()
    before = len(running.output.read_bytes())
    with contextlib.closing(greedy.connect()) as line:
        for _ in range(200):
            headers = {**greedy.headers(), "content-type": "application/CANARY-" + "x" * 4000}
            body = PullMessagesRequest(node=Node(node_id=node))
            greedy.post("/v1/fleet/pull-messages", body, headers, line)
    refused = _push(asked, 1)
    refused.messages_list[0].metadata.reply_to_message_id = "c" * 64
    refused.messages_list[0].error.reason = "CANARY\n\x1b[2J"
    greedy.post(PUSH, refused)
    fab = GetFabRequest(node=Node(node_id=node), run_id=1, hash_str="CANARY\n\x1b[2J" * 50_000)
    with contextlib.suppress(ssl.SSLError, ConnectionError, HTTPException):
        greedy.post("/v1/fleet/get-fab", fab)
    text = running.output.read_bytes()[before:].decode()
    assert "CANARY" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert 0 < len(lines) < 30
    for shown in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT\S+ (WARNING|ERROR) [\w.]+ \w+:\d+ ", shown), shown
        assert shown.rpartition("site=")[2].partition(" ")[0] == "greedy"
