"""The gate, held against the database at every request, and the ports' own rules."""

from __future__ import annotations

import asyncio
import base64
import socket
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.message_pb2 import PushObjectRequest

from cloister_fl.errors import ListenRefused, ServerFolderInvalid
from cloister_fl.membership.enrolment import HEADER_PROTOCOL, HEADER_VERSION, PATH_ROSTER
from cloister_fl.server.coordinator import site_database
from cloister_fl.server.coordinator.folder import Layout, init_coordinator, open_coordinator
from cloister_fl.server.coordinator.rejection_log import LINES_A_SECOND, Refusals, Refused
from cloister_fl.server.coordinator.site_database import Registry, SiteRow
from cloister_fl.server.network import enrolment_app
from cloister_fl.server.network.fleet_gate import (
    BUFFERED_EACH,
    PRIVATE_BODY,
    Engine,
    FleetGate,
    private_app,
)
from cloister_fl.server.network.request_shape import PIECE_BYTES, RequestShapes
from cloister_fl.server.network.tls_listener import (
    BACKLOG,
    PEER,
    ConnectionLimiter,
    Limits,
    Listener,
    Peer,
    bind,
    network_of,
    server_context,
)
from cloister_fl.version import PROTOCOL, __version__
from support.errors import raises

KEY = b"-----a key-----"
PULL = b"\x0a\x02\x08\x07"
"""A pull of messages, by node 7."""
SHAPES = RequestShapes(lambda: 0)


class Rows:
    """A database that says what a test wants."""

    def __init__(self, *states: str, valid_for: float = 1000) -> None:
        self.states = list(states)
        self.until = int(time.time() + valid_for)

    def by_certificate(self, fingerprint: bytes) -> SiteRow | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state == "unknown":
            return None
        return SiteRow(
            "north", state, b"i", KEY, b"t", 0, 0, b"c", fingerprint, self.until, None, None
        )

    def by_renewed(self, fingerprint: bytes) -> SiteRow | None:
        """Nobody renews here."""

    def saw(self, site: SiteRow) -> None:
        """Nothing."""


def ask(
    rows: Rows,
    tmp_path: Path,
    *,
    path: str = "/v1/fleet/pull-messages",
    key: bytes = KEY,
    method: str = "POST",
    body: bytes = PULL,
    signed: bool = True,
    begun: list[bytes] | None = None,
    answers: list[dict[str, Any]] | None = None,
) -> tuple[int, list[dict[str, Any]]]:
    """One request through the gate: its status, and what Flower's application was given."""
    given: list[dict[str, Any]] = []
    answers = [] if answers is None else answers

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        given.append({**scope, "body": (await receive())["body"]})
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(event: dict[str, Any]) -> None:
        answers.append(event)

    engine = Engine(
        flower,
        b"key",
        frozenset({"/v1/fleet/pull-messages", "/v1/fleet/activate-node"}),
        lambda *_: signed,
        "",
        lambda _: True,
        "/v1/fleet/activate-node",
        [].append if begun is None else begun.append,
        "",
        lambda *_: True,
    )
    refusals = Refusals(tmp_path / "refused.jsonl")
    files = (rows, refusals, tmp_path / "roster")
    gate = FleetGate(engine, *files, SHAPES, None)  # type: ignore[arg-type]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "state": {PEER: Peer("127.0.0.1", b"f" * 32)},
        "headers": [(b"host", b"evil/x"), (b"key", base64.b64encode(key))],
    }
    asyncio.run(gate(scope, receive, send))
    refusals.close()
    return answers[0]["status"], given


def test_an_approved_site_with_its_own_key(tmp_path: Path) -> None:
    status, given = ask(Rows("approved"), tmp_path)
    assert status == 200
    assert given[0]["body"] == PULL
    assert dict(given[0]["headers"])[b"host"] == b"cloister"


@pytest.mark.parametrize("state", ["pending", "revoked", "unknown"])
def test_any_other_state(tmp_path: Path, state: str) -> None:
    assert ask(Rows(state), tmp_path) == (403, [])


def test_revoked_while_the_body_came(tmp_path: Path) -> None:
    assert ask(Rows("approved", "revoked"), tmp_path) == (403, [])


def test_a_certificate_that_ended_since_the_handshake(tmp_path: Path) -> None:
    assert ask(Rows("approved", valid_for=-1), tmp_path) == (403, [])


def test_another_key(tmp_path: Path) -> None:
    assert ask(Rows("approved"), tmp_path, key=b"another") == (401, [])


def test_another_path(tmp_path: Path) -> None:
    assert ask(Rows("approved"), tmp_path, path="/v1/fleet/register-node") == (404, [])


@pytest.mark.parametrize("body", [b"\xff", PULL * 2, b"\x12\x00", PULL + b"\x12\x01a"])
def test_a_body_that_no_node_sends_is_not_parsed(tmp_path: Path, body: bytes) -> None:
    assert ask(Rows("approved"), tmp_path, body=body) == (400, [])


def test_a_body_of_more_bytes_than_a_node_sends(tmp_path: Path) -> None:
    assert ask(Rows("approved"), tmp_path, body=bytes(1 << 20)) == (413, [])


def test_a_signature_that_does_not_fit_starts_no_work(tmp_path: Path) -> None:
    """A node that comes online ends its last life: that writes, and is for its own key alone."""
    begun: list[bytes] = []
    path = "/v1/fleet/activate-node"
    for signed, status in ((False, 401), (True, 200)):
        assert (
            ask(Rows("approved"), tmp_path, path=path, body=b"", signed=signed, begun=begun)[0]
            == status
        )
    assert begun == [KEY]


def test_pushes_of_one_site_wait_for_each_other_and_heartbeats_for_nobody(tmp_path: Path) -> None:
    """Four pushes at once, which Flower never ends; a heartbeat, and another site, are served."""
    push, beat = "/v1/fleet/push-messages", "/v1/fleet/send-node-heartbeat"
    working: list[str] = []
    tree = b"\x0a\x40" + b"0" * 64
    reply = PULL + b"\x12\x00\x1a" + bytes([len(tree)]) + tree

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        working.append(scope["path"])
        if scope["path"] == push:
            await asyncio.sleep(3600)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    engine = Engine(
        flower,
        b"key",
        frozenset({push, beat}),
        lambda *_: True,
        push,
        lambda _: True,
        "",
        print,
        "",
        lambda *_: True,
    )
    refusals = Refusals(tmp_path / "refused.jsonl")

    class Both(Rows):
        def by_certificate(self, fingerprint: bytes) -> SiteRow | None:
            row = super().by_certificate(fingerprint)
            return row and replace(row, name=fingerprint.decode())

    files = (Both("approved"), refusals, tmp_path / "roster")
    gate = FleetGate(engine, *files, SHAPES, None)  # type: ignore[arg-type]

    async def ask(who: bytes, path: str, body: bytes) -> int:
        statuses = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            statuses.append(event.get("status"))

        headers = [(b"key", base64.b64encode(KEY))]
        state = {PEER: Peer("127.0.0.1", who)}
        scope = {"type": "http", "method": "POST", "path": path, "state": state, "headers": headers}
        await gate(scope, receive, send)
        return int(statuses[0])

    async def run() -> int:
        pushes = [asyncio.create_task(ask(b"greedy", push, reply)) for _ in range(4)]
        while not working:
            await asyncio.sleep(0.01)
        pushes.append(asyncio.create_task(ask(b"honest", push, reply)))
        status = await asyncio.wait_for(ask(b"greedy", beat, PULL), 60)
        while working.count(push) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # for those who should wait
        for task in pushes:
            task.cancel()
        await asyncio.gather(*pushes, return_exceptions=True)
        return status

    assert asyncio.run(run()) == 200
    assert sorted(working) == [push, push, beat]
    refusals.close()


def test_the_versions_are_told_beside_the_roster_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "roster").write_bytes(b"signed")
    answers: list[dict[str, Any]] = []
    assert (
        ask(Rows("approved"), tmp_path, path=PATH_ROSTER, method="GET", answers=answers)[0] == 200
    )
    told = dict(answers[0]["headers"])
    assert told[HEADER_PROTOCOL.encode()] == str(PROTOCOL).encode()
    assert told[HEADER_VERSION.encode()] == __version__.encode()
    assert answers[1]["body"] == b"signed"
    for rows, path in ((Rows("revoked"), PATH_ROSTER), (Rows("approved"), "/docs")):
        answers.clear()
        assert ask(rows, tmp_path, path=path, method="GET", answers=answers)[0] in {403, 404}
        assert HEADER_VERSION.encode() not in dict(answers[0]["headers"])


# Ports


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "localhost", "example.org"])
def test_no_port_without_tls_but_on_loopback(host: str) -> None:
    with pytest.raises(ListenRefused, match="without TLS"):
        bind(f"{host}:9443", None)


def test_loopback_without_tls_and_everywhere_with_it(tmp_path: Path) -> None:
    place = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))
    context = server_context(place.keys / "server.pem", place.keys / "server.key", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenRefused, match="The server cannot listen on"):
            bind(f"127.0.0.1:{port}", None)
    bind(f"127.0.0.1:{port}", None).close()
    bind(f"0.0.0.0:{port}", context).close()


def test_a_private_port_is_loopback_or_the_folder_does_not_open(tmp_path: Path) -> None:
    place = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))
    path = place.root / "server.toml"
    path.write_text(path.read_text().replace('health = "127.0.0.1', 'health = "0.0.0.0'))
    with raises(ServerFolderInvalid, match="loopback"):
        open_coordinator(place.root)


def test_a_local_account_s_endless_body_is_not_read(tmp_path: Path) -> None:
    """Flower asks for the secret once it has the whole body."""
    given: list[int] = []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        given.append(len((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(pieces: int) -> tuple[int, int]:
        taken, statuses = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal taken
            taken += 1
            more = taken < pieces
            return {"type": "http.request", "body": bytes(1 << 20), "more_body": more}

        async def send(event: dict[str, Any]) -> None:
            statuses.append(event.get("status"))

        scope = {"type": "http", "path": "/v1/runtime/acquire-task", "headers": []}
        await private_app(flower)(scope, receive, send)
        return int(statuses[0]), taken

    limit = PRIVATE_BODY >> 20
    assert asyncio.run(ask(limit)) == (200, limit)
    assert asyncio.run(ask(1 << 20)) == (413, limit + 1)
    assert given == [PRIVATE_BODY]


# Dawdlers, with short times


@pytest.mark.long
def test_dawdlers_are_cut(tmp_path: Path) -> None:
    place = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))
    context = server_context(place.keys / "server.pem", place.keys / "server.key", None)
    log = tmp_path / "refused.jsonl"

    async def run() -> dict[str, bytes]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (await receive()).get("more_body"):
                pass

        refusals = Refusals(log)
        limits = Limits(handshake_s=0.5, head_s=0.5, gap_s=0.5, body_s=30)
        limiter = ConnectionLimiter("fleet", context, refusals, limits)
        bound = socket.create_server(("127.0.0.1", 0))
        address = bound.getsockname()
        listener = Listener(app, limiter)
        tasks = [asyncio.create_task(listener.serve([bound])), asyncio.create_task(limiter.watch())]
        while not listener.started:
            await asyncio.sleep(0.01)
        from support import coordinator_process

        ends = {}
        for name, text in {
            "head": b"POST / HTTP/1.1\r\nHost: x\r\n",
            "nothing": b"",
            "body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc",
        }.items():
            reader, writer = await asyncio.open_connection(
                *address, ssl=coordinator_process.tls(), server_hostname="x"
            )
            writer.write(text)
            try:
                ends[name] = await asyncio.wait_for(reader.read(), 5)
            except ConnectionError:
                ends[name] = b""
            writer.transport.abort()
        reader, writer = await asyncio.open_connection(*address)
        try:
            ends["handshake"] = await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            ends["handshake"] = b""
        writer.transport.abort()
        listener.should_exit = True
        await tasks[0]
        tasks[1].cancel()
        refusals.close()
        return ends

    assert asyncio.run(run()) == dict.fromkeys(("head", "nothing", "body", "handshake"), b"")
    text = log.read_text()
    codes = ("head-slow", "body-slow", "handshake-slow")
    assert [text.count(code) for code in codes] == [2, 1, 1]


@pytest.mark.long
def test_a_burst_of_connections_that_say_nothing_leaves_none_open(tmp_path: Path) -> None:
    """All in one turn of the loop, so that most must go before their handshake had a turn."""
    place = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))
    context = server_context(place.keys / "server.pem", place.keys / "server.key", None)

    async def run() -> tuple[int, int]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("nobody asked for anything")

        refusals = Refusals(tmp_path / "refused.jsonl")
        limiter = ConnectionLimiter(
            "fleet", context, refusals, Limits(handshakes=8, handshake_s=1.0)
        )
        bound = socket.create_server(("127.0.0.1", 0), backlog=256)
        listener = Listener(app, limiter)
        task = asyncio.create_task(listener.serve([bound]))
        while not listener.started:
            await asyncio.sleep(0.01)
        clients = [socket.create_connection(bound.getsockname()) for _ in range(BACKLOG - 4)]
        await asyncio.sleep(0.5)
        still = sum(_open(client) for client in clients)
        await asyncio.sleep(1.5)
        left = sum(_open(client) for client in clients)
        for client in clients:
            client.close()
        listener.should_exit = True
        await task
        refusals.close()
        return still, left

    still, left = asyncio.run(run())
    assert still <= 8
    assert left == 0


def _open(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_whoever_opens_many_pushes_out_their_own_first(tmp_path: Path) -> None:
    class Begun:
        def __init__(self, address: str) -> None:
            self.peer = Peer(address)
            self.gone = False

        def give_way(self) -> None:
            self.gone = True

    refusals = Refusals(tmp_path / "refused.jsonl")
    limiter = ConnectionLimiter("fleet", None, refusals, Limits(handshakes=4))  # type: ignore[arg-type]
    hospital = Begun("192.0.2.7")
    many = [Begun(f"2001:db8:0:1::{number:x}") for number in range(20)]
    for one in (hospital, *many):
        limiter.began(one)  # type: ignore[arg-type]
    assert not hospital.gone
    assert [one.gone for one in many] == [True] * 17 + [False] * 3
    refusals.close()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_network_is_what_one_party_holds(address: str, network: str) -> None:
    assert network_of(address) == network


def test_a_flood_does_not_fill_the_log(tmp_path: Path) -> None:
    refusals = Refusals(tmp_path / "refused.jsonl")
    for _ in range(5000):
        refusals.tell(Refused.NOT_TLS, "fleet", "192.0.2.1")
    refusals.tell(Refused.BUSY, "fleet", "192.0.2.1")
    time.sleep(2 / LINES_A_SECOND)
    refusals.tell(Refused.NOT_TLS, "fleet", "192.0.2.1")
    refusals.close()
    lines = (tmp_path / "refused.jsonl").read_text().splitlines()
    assert len(lines) < 60
    assert "not_shown" in lines[-1]
    assert any("busy" in line for line in lines)


def test_the_database_is_its_owners_alone(tmp_path: Path) -> None:
    site_database.create(tmp_path / "r.sqlite")
    (tmp_path / "r.sqlite").chmod(0o644)
    Registry(tmp_path / "r.sqlite").close()
    assert (tmp_path / "r.sqlite").stat().st_mode & 0o077 == 0


def test_the_log_of_the_database_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    """In 300 rounds it grew to 1.2 MiB beside a database of 50 KiB."""
    site_database.create(tmp_path / "r.sqlite")
    rows = Registry(tmp_path / "r.sqlite")
    for number in range(150):
        rows.invite([f"site{number}"], 600)
    assert (tmp_path / "r.sqlite-wal").stat().st_size < 400 << 10
    rows.close()


def test_a_database_that_somebody_holds_keeps_no_request_waiting(tmp_path: Path) -> None:
    site_database.create(tmp_path / "r.sqlite")
    rows = Registry(tmp_path / "r.sqlite")
    holder = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    site = Rows("approved").by_certificate(b"")
    assert site is not None
    rows.saw(site)
    assert time.monotonic() - began < 2
    holder.execute("ROLLBACK")
    holder.close()
    rows.close()


# Shares: one who asks for everything leaves the others theirs


def test_one_address_does_not_use_up_the_enrolment_of_all() -> None:
    rate = enrolment_app._Rate()
    first = [rate.exceeded("203.0.113.9") for _ in range(2 * enrolment_app.ALL_A_MINUTE)]
    assert first.count(False) == enrolment_app.EACH_A_MINUTE
    assert not rate.exceeded("198.51.100.1")


def test_one_hospital_does_not_use_up_the_memory_of_all(tmp_path: Path) -> None:
    """Site a holds as many bodies as it may, and ends none; site b's whole body passes."""
    path = "/v1/fleet/push-object"

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    engine = Engine(
        flower,
        b"key",
        frozenset({path}),
        lambda *_: True,
        "",
        lambda _: True,
        "",
        lambda _: None,
        "",
        lambda *_: True,
    )
    refusals = Refusals(tmp_path / "refused.jsonl")
    named = {b"a" * 32: "a", b"b" * 32: "b"}

    class Both(Rows):
        def by_certificate(self, fingerprint: bytes) -> SiteRow | None:
            row = super().by_certificate(fingerprint)
            return row and replace(row, name=named[fingerprint])

    files = (Both("approved"), refusals, tmp_path / "roster")
    gate = FleetGate(engine, *files, SHAPES, None)  # type: ignore[arg-type]
    content = PushObjectRequest(object_content=bytes(PIECE_BYTES)).SerializeToString()

    async def ask(who: bytes, *, stalls: bool) -> int:
        pieces = [content]
        statuses = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": pieces.pop(), "more_body": stalls}

        async def send(event: dict[str, Any]) -> None:
            statuses.append(event.get("status"))

        headers = [(b"key", base64.b64encode(KEY))]
        state = {PEER: Peer("127.0.0.1", who)}
        scope = {"type": "http", "method": "POST", "path": path, "state": state, "headers": headers}
        await gate(scope, receive, send)
        return int(statuses[0])

    async def run() -> tuple[list[int], int]:
        greedy = [asyncio.create_task(ask(b"a" * 32, stalls=True)) for _ in range(8)]
        await asyncio.sleep(0.5)
        turned = [task.result() for task in greedy if task.done()]
        other = await ask(b"b" * 32, stalls=False)
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        return turned, other

    within = BUFFERED_EACH // len(content)
    assert asyncio.run(run()) == ([503] * (8 - within), 200)
    assert gate._held.total() == 0
    refusals.close()
