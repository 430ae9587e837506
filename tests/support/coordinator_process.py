"""A real coordinator in a process of its own, and hospitals that joined it, for tests."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPSConnection
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from google.protobuf.message import Message

from cloister_fl.client.network import join as joining
from cloister_fl.client.network.node_keys import node_key
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import CloisterError, CoordinatorUnreachable
from cloister_fl.membership import ec_keys
from cloister_fl.membership.enrolment import Invite
from cloister_fl.server.coordinator.folder import Coordinator, Layout, init_coordinator
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites
from cloister_fl.server.coordinator.site_database import SiteRow

PROTOBUF = {"content-type": "application/protobuf"}
SERVER = "from cloister_fl.server.cli.server_group import app; app()"


def free_ports(count: int) -> list[int]:
    """Ports that nobody had a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def new_coordinator(folder: Path) -> Coordinator:
    """A coordinator's folder with free loopback ports."""
    fleet, enrolment, health = free_ports(3)
    made = init_coordinator(folder, Layout((f"127.0.0.1:{fleet}",), "fed", "127.0.0.1"))
    text = (folder / "server.toml").read_text()
    for old, new in ((fleet + 1, enrolment), (fleet + 2, health)):
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    (folder / "server.toml").write_text(text)
    return init_coordinator(made.root, None)


@dataclass
class Running:
    """A coordinator whose server runs."""

    place: Coordinator
    process: subprocess.Popen[bytes]
    output: Path
    secrets: list[bytes] = field(default_factory=list)

    @property
    def fleet(self) -> tuple[str, int]:
        return _parts(self.place.file.fleet.addresses[0])

    @property
    def enrolment(self) -> tuple[str, int]:
        return _parts(self.place.file.enrolment.addresses[0])

    def refusals(self) -> list[dict[str, object]]:
        path = self.place.refusals
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def refused(self, act: Callable[[], object], code: str, within: float = 5.0) -> object:
        """Do something and require a new log line with this code."""
        before = sum(line["code"] == code for line in self.refusals())
        result = act()
        wait_for(
            lambda: sum(line["code"] == code for line in self.refusals()) > before,
            within,
            lambda: f"no line says {code}: {self.refusals()[-3:]}",
        )
        return result

    def row(self, name: str) -> SiteRow | None:
        """What the database says of a site."""
        with self.place.registry() as registry:
            return registry.site(name)

    def rss(self) -> int:
        """Resident memory of the server, bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def invite(self, name: str, lifetime_s: int = 600) -> Invite:
        (made,) = invite_sites(self.place, [name], lifetime_s, to_file=False)
        invite = Invite.decode(made.line)
        self.secrets += [invite.secret, made.line.encode()]
        wait_for(lambda: reachable(self.enrolment), 5, lambda: "enrolment stays closed")
        return invite

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)


def start(place: Coordinator, output: Path) -> Running:
    """Start a coordinator's server and wait until it serves."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "start", "--dir", str(place.root)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    running = Running(place, process, output)
    wait_for(
        lambda: b"Serving" in output.read_bytes() or process.poll() is not None,
        240,
        output.read_text,
    )
    assert process.poll() is None, output.read_text()
    return running


def wait_for(holds: Callable[[], bool], within: float, told: Callable[[], str]) -> None:
    """Poll until something holds."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, told()
        time.sleep(0.05)


def reachable(address: tuple[str, int]) -> bool:
    """True where something listens."""
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True


@dataclass
class Hospital:
    """A site that joined and was approved, and speaks as Flower's node does."""

    running: Running
    site: Site
    _node_id: int = 0

    @property
    def node_key(self) -> bytes:
        return ec_keys.public_pem(self._node())

    def _node(self) -> ec.EllipticCurvePrivateKey:
        return node_key(self.site)

    def headers(self) -> dict[str, str]:
        """Flower's authentication: a signed time stamp."""
        stamp = datetime.datetime.now(datetime.UTC).isoformat()
        signature = self._node().sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self.node_key).decode(),
            "flwr-signature": base64.b64encode(signature).decode(),
            "flwr-timestamp": stamp,
            **PROTOBUF,
        }

    def connect(self) -> HTTPSConnection:
        context = joining.client_context(self.site)
        return HTTPSConnection(*self.running.fleet, context=context, timeout=30)

    def post(
        self,
        path: str,
        message: Message | bytes,
        headers: dict[str, str] | None = None,
        connection: HTTPSConnection | None = None,
    ) -> tuple[int, bytes]:
        """One request over this site's certificate: status and body."""
        line = connection or self.connect()
        body = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            line.request("POST", path, body, headers or self.headers())
            response = line.getresponse()
            return response.status, response.read()
        finally:
            if connection is None:
                line.close()

    def activate(self) -> int:
        """Come online as a node, once: its id."""
        if self._node_id:
            return self._node_id
        request = ActivateNodeRequest(public_key=self.node_key, heartbeat_interval=30)
        status, body = 0, b""
        for _ in range(40):  # the server registers an approved node within a moment
            status, body = self.post("/v1/fleet/activate-node", request)
            if status == 200:
                break
            time.sleep(0.1)
        assert status == 200, body
        self._node_id = int(ActivateNodeResponse.FromString(body).node_id)
        return self._node_id


def join(running: Running, folder: Path, name: str) -> Hospital:
    """Invite, join, approve and pick up, with what the commands call."""
    invite = running.invite(name)
    site = joining.prepare(folder, invite)
    # The port of the invite before may have been about to close.
    wait_for(lambda: _is_asked(site, invite), 15, lambda: "enrolment stays closed")
    assert approve_site(running.place, name)
    assert joining.look(site).state == "approved"
    return Hospital(running, site)


def _is_asked(site: Site, invite: Invite) -> bool:
    try:
        return joining.ask(site, invite).state == "pending"
    except CloisterError as error:
        if error.code != CoordinatorUnreachable.code:
            raise
        return False


def tls(**change: object) -> ssl.SSLContext:
    """A client that believes anybody, as an outsider would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in change.items():
        setattr(context, name, value)
    return context


def send(address: tuple[str, int], path: str, body: bytes) -> int:
    """POST as anybody: the status."""
    line = HTTPSConnection(*address, context=tls(), timeout=10)
    with contextlib.closing(line):
        line.request("POST", path, body)
        return line.getresponse().status


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
