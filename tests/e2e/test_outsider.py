"""An outsider, and a hospital that misbehaves, at the real ports of a real server.

Each is refused, and each refusal is a line in the log.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import ssl
import stat
import time
from dataclasses import replace
from http.client import HTTPSConnection
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as Reply
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from cloister_fl.client.network import join
from cloister_fl.errors import CoordinatorUnproven, CoordinatorUnreachable, EnrolmentRefused
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import PATH_ENROL, PATH_ROSTER, Invite, Request
from cloister_fl.membership.identity import Identity
from cloister_fl.server.coordinator.certificate_authority import Authority, pem
from cloister_fl.server.coordinator.site_approval import revoke_site
from support import coordinator_process
from support.coordinator_process import Hospital, Running, tls, wait_for
from support.errors import raises

PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-messages"
GIB = 1 << 30


@pytest.fixture(scope="module")
def north(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return coordinator_process.join(running, tmp_path_factory.mktemp("north"), "north")


@pytest.fixture(scope="module")
def south(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return coordinator_process.join(running, tmp_path_factory.mktemp("south"), "south")


def pull(node: int) -> PullMessagesRequest:
    return PullMessagesRequest(node=Node(node_id=node))


def talk(address: tuple[str, int], context: ssl.SSLContext, path: str = PULL) -> int:
    """One request with any TLS context: its status; raises where the connection is refused."""
    line = HTTPSConnection(*address, context=context, timeout=20)
    try:
        line.request("POST", path, b"", coordinator_process.PROTOBUF)
        return line.getresponse().status
    finally:
        line.close()


def own_certificate(folder: Path, authority: Authority, name: str, *, server: bool = False) -> Path:
    """A fresh key with a certificate of an authority, as one PEM file."""
    key = ec_keys.generate_pem(Purpose.TLS)
    public = ec_keys.load_private(key, Purpose.TLS).public_key()
    made = (
        authority.server_certificate(public, ["127.0.0.1"])
        if server
        else authority.site_certificate(public, name)
    )
    path = folder / f"{name}.pem"
    path.write_bytes(key + pem(made))
    return path


# What works


def test_an_approved_hospital_is_served(north: Hospital, south: Hospital) -> None:
    for hospital in (north, south):
        status, _ = hospital.post(PULL, pull(hospital.activate()))
        assert status == 200


# No certificate, or the wrong one


def test_no_certificate(running: Running) -> None:
    def act() -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            talk(running.fleet, tls())

    running.refused(act, "no-certificate")


def test_a_certificate_of_another_authority(running: Running, tmp_path: Path) -> None:
    context = tls()
    context.load_cert_chain(own_certificate(tmp_path, Authority.create(tmp_path, "mine"), "north"))

    def act() -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            talk(running.fleet, context)

    running.refused(act, "foreign-certificate")


def test_the_servers_own_kind_of_certificate_is_no_clients(
    running: Running, tmp_path: Path
) -> None:
    context = tls()
    context.load_cert_chain(
        own_certificate(tmp_path, running.place.authority(), "spare", server=True)
    )

    def act() -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            talk(running.fleet, context)

    running.refused(act, "foreign-certificate")


def test_a_certificate_that_the_database_does_not_know(running: Running, tmp_path: Path) -> None:
    context = tls()
    context.load_cert_chain(own_certificate(tmp_path, running.place.authority(), "ghost"))
    assert running.refused(lambda: talk(running.fleet, context), "certificate-unknown") == 403


@pytest.mark.parametrize("port", ["fleet", "enrolment"])
def test_older_tls(running: Running, north: Hospital, port: str) -> None:
    running.invite("door-opener")
    context = join.client_context(north.site)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def act() -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            talk(getattr(running, port), context)

    running.refused(act, "not-tls-1.3")


def test_no_tls_at_all(running: Running) -> None:
    def act() -> bytes:
        with socket.create_connection(running.fleet, 5) as line:
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                return line.recv(100)
        return b""

    answer = running.refused(act, "not-tls-1.3")
    assert isinstance(answer, bytes)
    assert b"HTTP" not in answer


# Revoked


def test_revoked_on_an_open_connection(running: Running, tmp_path: Path) -> None:
    hospital = coordinator_process.join(running, tmp_path / "leaver", "leaver")
    node = hospital.activate()
    stack = contextlib.ExitStack()
    asking, silent = (stack.enter_context(contextlib.closing(hospital.connect())) for _ in range(2))
    assert hospital.post(PULL, pull(node), connection=asking)[0] == 200
    assert hospital.post(PULL, pull(node), connection=silent)[0] == 200
    held = asking.sock
    revoke_site(running.place, "leaver")
    # At the next request: an answer that says so, or, half a second later, no connection.
    with contextlib.suppress(ConnectionError):
        assert hospital.post(PULL, pull(node), connection=asking)[0] == 403
        assert asking.sock in {held, None}
        assert running.refusals()[-1]["code"] == "certificate-revoked"
    # And a connection that asks for nothing is cut.
    silent.sock.settimeout(5)
    with contextlib.suppress(ConnectionError):
        assert silent.sock.recv(1) == b""
    stack.close()
    # A new one gets no further.
    assert running.refused(lambda: hospital.post(PULL, pull(node)), "certificate-revoked") == (
        403,
        b"certificate-revoked",
    )
    with pytest.raises(EnrolmentRefused):
        join.look(hospital.site)


# Invites


def test_a_wrong_secret(running: Running, tmp_path: Path) -> None:
    invite = running.invite("guessed")
    wrong = replace(invite, secret=bytes(32))
    site = join.prepare(tmp_path / "guessed", wrong)

    def act() -> None:
        with pytest.raises(EnrolmentRefused, match="The invite is unknown to the coordinator"):
            join.ask(site, wrong)

    running.refused(act, "invite-unknown")
    assert running.row("guessed") is None


def test_an_invite_of_another_site(running: Running, tmp_path: Path) -> None:
    wrong = replace(running.invite("meant"), site="other")
    site = join.prepare(tmp_path / "other", wrong)

    def act() -> None:
        with pytest.raises(EnrolmentRefused):
            join.ask(site, wrong)

    running.refused(act, "invite-unknown")


def test_an_expired_invite(running: Running, tmp_path: Path) -> None:
    running.invite("keeps-the-port-open")
    invite = running.invite("late", lifetime_s=1)
    site = join.prepare(tmp_path / "late", invite)
    time.sleep(2.1)

    def act() -> None:
        with pytest.raises(EnrolmentRefused, match="The invite has expired"):
            join.ask(site, invite)

    running.refused(act, "invite-expired")
    assert running.row("late") is None


def test_a_used_invite(running: Running, tmp_path: Path) -> None:
    invite = running.invite("taken")
    site = join.prepare(tmp_path / "first", invite)
    assert join.ask(site, invite).state == "pending"
    # The same site again, after a lost answer: the same answer.
    assert join.ask(site, invite).state == "pending"
    thief = join.prepare(tmp_path / "thief", invite)

    def act() -> None:
        with pytest.raises(EnrolmentRefused, match="used already"):
            join.ask(thief, invite)

    running.refused(act, "invite-used")
    held = running.row("taken")
    assert held is not None
    assert held.identity == site.identity().public


@pytest.mark.parametrize("missing", [0, 1, 2], ids=["identity", "node", "tls"])
def test_a_key_that_the_asker_does_not_hold(running: Running, tmp_path: Path, missing: int) -> None:
    name = f"unproven-{missing}"
    invite = running.invite(name)
    honest = join.prepare(tmp_path / "honest", invite)
    pems = [(honest.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
    request = Request.make(invite, honest.identity(), *pems)
    other = Request.make(
        invite,
        Identity.generate(),
        ec_keys.generate_pem(Purpose.NODE),
        ec_keys.generate_pem(Purpose.TLS),
    )
    field = ("identity", "node_key", "tls_key")[missing]
    # Another's public key, and all three signatures made over a transcript that claims it.
    claimed = replace(request, **{field: getattr(other, field)})
    text = claimed.transcript(invite.authority, invite.root)
    node, tls_key = (
        ec_keys.load_private(key, purpose)
        for key, purpose in zip(pems, (Purpose.NODE, Purpose.TLS), strict=True)
    )
    label = "cloister/enrol/v1"
    proofs = (
        honest.identity().sign(label, b"identity", text),
        ec_keys.sign(node, label, b"node", text),
        ec_keys.sign(tls_key, label, b"tls", text),
    )
    forged = replace(claimed, proofs=proofs)

    def act() -> int:
        return coordinator_process.send(running.enrolment, PATH_ENROL, forged.encode())

    assert running.refused(act, "proof-invalid") == 403
    assert running.row(name) is None


def test_a_request_made_for_another_coordinator(running: Running, tmp_path: Path) -> None:
    invite = replace(running.invite("carried"), authority=bytes(32))
    site = join.prepare(tmp_path / "carried", invite)
    with raises(CoordinatorUnproven):
        join.ask(site, invite)
    request = Request.make(
        invite,
        site.identity(),
        *[(site.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)],
    )

    def act() -> int:
        return coordinator_process.send(running.enrolment, PATH_ENROL, request.encode())

    assert running.refused(act, "proof-invalid") == 403


@pytest.mark.slow
def test_a_man_in_the_middle_gets_nothing(
    running: Running, tmp_path: Path, north: Hospital
) -> None:
    """A site goes to somebody who has a certificate, and a whole server, of their own."""
    other = coordinator_process.new_coordinator(tmp_path / "other")
    invite = running.invite("lured")
    server = coordinator_process.start(other, tmp_path / "output")
    try:
        server.invite("anybody")
        host, port = server.enrolment
        lured = replace(invite, enrolment=f"{host}:{port}")
        with raises(CoordinatorUnproven):
            join.ask(join.prepare(tmp_path / "lured", lured), lured)
        member = join.membership(north.site)
        away = f"{server.fleet[0]}:{server.fleet[1]}"
        text = member.model_copy(update={"fleet": away}).model_dump_json()
        path = north.site.root / join.MEMBERSHIP
        kept = path.read_bytes()
        path.write_text(text)
        try:
            with raises(CoordinatorUnproven):
                join.look(north.site)
        finally:
            path.write_bytes(kept)
    finally:
        server.stop()


@pytest.mark.slow
def test_the_enrolment_port_is_open_only_while_an_invite_is(tmp_path: Path) -> None:
    server = coordinator_process.start(
        coordinator_process.new_coordinator(tmp_path / "fed"), tmp_path / "out"
    )
    try:
        assert not coordinator_process.reachable(server.enrolment)
        hospital = coordinator_process.join(server, tmp_path / "only", "only")
        hospital.activate()
        wait_for(
            lambda: not coordinator_process.reachable(server.enrolment), 5, lambda: "stays open"
        )
        with pytest.raises(CoordinatorUnreachable):
            join.ask(
                hospital.site,
                Invite(
                    f"{server.fleet[0]}:{server.fleet[1]}",
                    f"{server.enrolment[0]}:{server.enrolment[1]}",
                    server.place.authority().fingerprint,
                    server.place.federation_root(),
                    "only",
                    bytes(8),
                    bytes(32),
                    2**40,
                ),
            )
    finally:
        server.stop()


# Paths


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/control/list-nodes", "control-refused"),
        ("/v1/control/start-run", "control-refused"),
        ("/v1/runtime/acquire-task", "runtime-refused"),
        ("/v1/fleet/register-node", "path-refused"),
        ("/v1/fleet/../control/list-nodes", "path-refused"),
        ("/v1/fleet/%2e%2e/control/list-nodes", "path-refused"),
        ("//v1/control/list-nodes", "path-refused"),
        ("/docs", "path-refused"),
        ("/openapi.json", "path-refused"),
        ("/health", "path-refused"),
    ],
)
def test_other_paths(running: Running, north: Hospital, path: str, code: str) -> None:
    assert running.refused(lambda: north.post(path, b""), code) == (404, code.encode())


def test_a_host_header_does_not_move_the_request(
    running: Running, north: Hospital, south: Hospital
) -> None:
    node, other = north.activate(), south.activate()
    headers = {**north.headers(), "Host": "x/v1/health?y="}
    assert north.post(PULL, pull(node), headers)[0] == 200

    def act() -> int:
        return north.post(PULL, pull(other), headers)[0]

    assert running.refused(act, "engine-refused") == 401


# In another's name


def test_a_header_of_another_hospital(running: Running, north: Hospital, south: Hospital) -> None:
    node = north.activate()
    seen = north.headers()
    assert north.post(PULL, pull(node), seen)[0] == 200
    assert running.refused(lambda: south.post(PULL, pull(node), seen), "other-node-key") == (
        401,
        b"other-node-key",
    )


def test_no_header_or_two(running: Running, north: Hospital, south: Hospital) -> None:
    node = north.activate()
    assert running.refused(
        lambda: south.post(PULL, pull(node), coordinator_process.PROTOBUF)[0], "other-node-key"
    )

    def act() -> int:
        with contextlib.closing(south.connect()) as line:
            line.putrequest("POST", PULL)
            for hospital in (south, north):
                line.putheader("flwr-public-key", hospital.headers()["flwr-public-key"])
            line.putheader("content-length", "0")
            line.endheaders()
            return line.getresponse().status

    assert running.refused(act, "other-node-key") == 401


def test_a_request_that_names_another_node(
    running: Running, north: Hospital, south: Hospital
) -> None:
    node = north.activate()
    status, _ = running.refused(lambda: south.post(PULL, pull(node)), "engine-refused")
    assert status == 401


def test_a_reply_in_another_hospitals_name(
    running: Running, north: Hospital, south: Hospital
) -> None:
    theirs, own = north.activate(), south.activate()
    root = "0" * 64
    forged = PushMessagesRequest(
        node=Node(node_id=own),
        messages_list=[Reply(metadata=Metadata(src_node_id=theirs, message_id=root))],
        message_object_trees=[ObjectTree(object_id=root)],
    )
    assert running.refused(lambda: south.post(PUSH, forged), "other-node-name") == (
        403,
        b"other-node-name",
    )


# Large and slow


@pytest.mark.parametrize("said", [True, False], ids=["content-length", "chunked"])
@pytest.mark.parametrize("port", ["fleet", "enrolment"])
def test_a_body_of_a_gibibyte(running: Running, north: Hospital, port: str, said: bool) -> None:
    running.invite("door-opener")
    north.activate()
    before = running.rss()
    piece = bytes(1 << 20)
    line = (
        north.connect()
        if port == "fleet"
        else HTTPSConnection(*running.enrolment, context=tls(), timeout=30)
    )
    sent = 0

    def act() -> int:
        nonlocal sent
        line.putrequest("POST", "/v1/fleet/push-object" if port == "fleet" else PATH_ENROL)
        for name, value in north.headers().items():
            line.putheader(name, value)
        if said:
            line.putheader("content-length", str(GIB))
        else:
            line.putheader("transfer-encoding", "chunked")
        line.endheaders()
        frame = piece if said else f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            while sent < GIB:
                line.send(frame)
                sent += len(piece)
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            return line.getresponse().status
        return 413

    with contextlib.closing(line):
        assert running.refused(act, "body-too-large", within=10) == 413
    # What is said to be too large is not read at all; else, up to the limit and some buffers.
    assert sent < (32 if said else 200) << 20
    assert running.rss() - before < 300 << 20


@pytest.mark.slow
def test_many_who_connect_and_say_nothing(running: Running, north: Hospital) -> None:
    node = north.activate()
    with contextlib.ExitStack() as held:
        lines = [held.enter_context(socket.create_connection(running.fleet, 5)) for _ in range(300)]
        for line in lines[:100]:
            line.sendall(b"\x16\x03\x01")
        start = time.monotonic()
        for _ in range(5):
            assert north.post(PULL, pull(node))[0] == 200
        assert time.monotonic() - start < 5
        codes = {line["code"] for line in running.refusals()}
        assert "handshakes-too-many" in codes
        wait_for(
            lambda: "handshake-slow" in {line["code"] for line in running.refusals()},
            20,
            lambda: str(running.refusals()[-3:]),
        )


def _descriptors(running: Running) -> int:
    return sum(1 for _ in Path(f"/proc/{running.process.pid}/fd").iterdir())


def test_a_burst_of_connections_takes_few_descriptors(running: Running, north: Hospital) -> None:
    """All are there when the server looks, as after a busy second; it accepts them in one turn.

    With a backlog of 2,048 the limit on handshakes came too late: 4,201 descriptors.
    """
    node = north.activate()
    before = _descriptors(running)
    most = 0
    with contextlib.ExitStack() as held:
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            for _ in range(min(1500, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)):
                line = held.enter_context(socket.socket())
                line.setblocking(False)
                # Another network than the hospital's, which would push out its own handshakes.
                line.bind(("127.0.0.2", 0))
                with contextlib.suppress(BlockingIOError):
                    line.connect(running.fleet)
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            most = max(most, _descriptors(running))
    assert 0 < most - before < 300
    assert north.post(PULL, pull(node))[0] == 200


@pytest.mark.slow
def test_many_who_never_end_their_head(running: Running, north: Hospital) -> None:
    running.invite("door-opener")
    node = north.activate()
    with contextlib.ExitStack() as held:
        lines = []
        for address, context in (
            (running.enrolment, tls()),
            (running.fleet, join.client_context(north.site)),
        ):
            for _ in range(8):
                plain = held.enter_context(socket.create_connection(address, 5))
                line = held.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
                line.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
                lines.append(line)
        end = time.monotonic() + 25
        open_still = set(lines)
        while open_still and time.monotonic() < end:
            for line in list(open_still):
                with contextlib.suppress(ssl.SSLError, OSError):
                    line.sendall(b"X-More: 1\r\n")
                    continue
                open_still.discard(line)
            assert north.post(PULL, pull(node))[0] == 200
            time.sleep(0.5)
        assert not open_still
        told = [line for line in running.refusals() if line["code"] == "head-slow"]
        assert {line["listener"] for line in told} == {"fleet", "enrolment"}


def test_one_certificate_holds_only_so_many_connections(
    running: Running, north: Hospital, south: Hospital
) -> None:
    node = south.activate()
    time.sleep(0.5)

    def act() -> None:
        with contextlib.ExitStack() as held:
            for _ in range(30):
                line = held.enter_context(contextlib.closing(north.connect()))
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    line.connect()
            assert south.post(PULL, pull(node))[0] == 200

    running.refused(act, "connections-too-many")


# Nothing secret gets out


def test_secrets_are_nowhere_but_in_their_files(running: Running, north: Hospital) -> None:
    north.activate()
    north.post("/v1/control/list-nodes", b"")
    place = running.place
    secrets = list(running.secrets)
    for folder in (place.keys, north.site.keys):
        for path in folder.iterdir():
            data = path.read_bytes()
            if b"PRIVATE KEY" in data or path.suffix in {".token", ".secret", ".key"}:
                secrets.append(b"".join(data.splitlines()[1:-1]) if b"PRIVATE" in data else data)
                secrets.append(data)
    assert len(secrets) > 14
    where = {
        "argv": Path(f"/proc/{running.process.pid}/cmdline").read_bytes(),
        "environment": Path(f"/proc/{running.process.pid}/environ").read_bytes(),
        "output": running.output.read_bytes(),
    }
    for path in place.root.rglob("*"):
        if path.is_file() and path.parent != place.keys:
            where[str(path)] = path.read_bytes()
    for name, data in where.items():
        for secret in secrets:
            assert secret not in data, name
            assert secret.hex().encode() not in data, name


def test_what_lies_on_disk_is_its_owners_alone(running: Running, north: Hospital) -> None:
    north.activate()
    checked = 0
    for root in (running.place.root, north.site.root):
        for path in [root, *root.rglob("*")]:
            mode = stat.S_IMODE(path.lstat().st_mode)
            if root == running.place.root or "keys" in path.parts or path.suffix == ".json":
                assert mode & 0o077 == 0, f"{path}: {mode:o}"
                checked += 1
    assert checked > 25


def test_the_log_holds_nothing_that_an_outsider_wrote(running: Running, north: Hospital) -> None:
    running.refused(
        lambda: north.post("/v1/control/CANARY", b"CANARY", {"x": "CANARY"}), "control-refused"
    )
    assert "CANARY" not in running.place.refusals.read_text()
    assert "CANARY" not in running.output.read_text()
    for line in running.refusals():
        assert set(line) <= {
            "time",
            "event",
            "listener",
            "code",
            "peer",
            "site",
            "status",
            "not_shown",
        }
        assert re.fullmatch(r"[a-z0-9.-]+", str(line["code"]))


def test_the_roster_is_for_enrolled_sites(running: Running, north: Hospital) -> None:
    assert join.fetch_roster(north.site) == (running.place.keys / "roster").read_bytes()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        talk(running.fleet, tls(), PATH_ROSTER)
