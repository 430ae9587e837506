"""The coordinator's server: two ports, a socket and a health service, in one process and loop.

::

    fleet       public    TLS 1.3, client certificates, ``fleet_gate.FleetGate`` before Flower
    enrolment   public    TLS 1.3, open only while an invite is
    control     UNIX      Flower's Control and Runtime, behind a token and a secret
    health      loopback  grpc.health.v1

It holds neither the authority's nor the root's private key: approving is a command's work, and a
renewed certificate is issued by a process that is started for it (``renewal_issuer``). What
the commands change in the database takes effect here at the next request, and within a second on
connections that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import queue
import shlex
import signal
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cloister_fl.cli.folder_option import dir_option
from cloister_fl.errors import ListenRefused, ServerFolderInvalid, ServerState
from cloister_fl.server.coordinator import output_log
from cloister_fl.server.coordinator.certificate_authority import CA_CERTIFICATE, pem
from cloister_fl.server.coordinator.certificate_dates import require_valid, warnings_of
from cloister_fl.server.coordinator.folder import SERVER_CERTIFICATE, SERVER_KEY, Coordinator
from cloister_fl.server.coordinator.rejection_log import Refusals
from cloister_fl.server.coordinator.run_queue import update_bytes
from cloister_fl.server.coordinator.site_database import Registry, unusable
from cloister_fl.server.coordinator.site_renewal import RenewalDesk
from cloister_fl.server.network.enrolment_app import EnrolmentApp
from cloister_fl.server.network.fleet_gate import Engine, FleetGate, private_app
from cloister_fl.server.network.request_shape import RequestShapes
from cloister_fl.server.network.tls_listener import (
    ConnectionLimiter,
    Listener,
    bind,
    require_loopback,
    server_context,
)
from cloister_fl.system.child_process import Child, environment, failure_in_words
from cloister_fl.system.files import Mark, mark_of, read_secret
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.health import Health, healthy
from cloister_fl.system.local_socket.socket_file import listen
from cloister_fl.system.pid_lock import holder, only_one

AGAIN_S = 60.0
"""How long until a database that was busy is shrunk."""
TICK_S = 0.5
"""How often the database is looked at for what was approved, revoked or invited."""
_FLOWER_LOST = (
    "It holds messages under way and nothing else: a run goes on from its last checkpoint, without "
    "the round that was under way. "
)
WARN_S = 86400.0
"""How often it is told of certificates whose end is near, while the server runs."""


def running(coordinator: Coordinator) -> int | None:
    """The process id of the server of this folder, or ``None`` where none runs."""
    return holder(coordinator.lock)


def serve(coordinator: Coordinator, ready: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        coordinator: the opened folder.
        ready: called once when all ports are open.

    Raises:
        ServerState: the folder's server runs already.
        CertificateExpired, ClockOrDates: a certificate does not hold now.
        ListenRefused: a port cannot be had.
        LocalSocketRefused: others can use the folder of the server's socket.
        FileUnreadable: a key cannot be read, or others can read it.
    """
    require_valid(coordinator)
    os.umask(0o077)
    # Before flwr is imported: no telemetry, no update server, no home of the user's, no install.
    os.environ.update(
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_HOME=str(coordinator.root / "flower"),
    )
    output_log.install()

    def taken() -> Exception:
        return ServerState(
            f"The server of {coordinator.root} is already running.",
            remedy=f"Stop it first: cloister server stop{dir_option(coordinator.root)}",
        )

    with only_one(coordinator.lock, taken), coordinator.registry() as registry:
        # A folder of an earlier version has none.
        keep_out_of_git(coordinator.root)
        asyncio.run(_Service(coordinator, registry).run(ready))


class _NodeKeys(NamedTuple):
    """Arguments of ``superlink.Nodes.reconcile``."""

    approved: dict[str, bytes]
    known: frozenset[bytes]
    renewed: dict[bytes, bytes]


@dataclass
class _Service:
    coordinator: Coordinator
    registry: Registry
    _listeners: dict[str, tuple[Listener, asyncio.Task[None]]] = field(default_factory=dict)
    _limiters: list[ConnectionLimiter] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _events: queue.Queue[tuple[str, dict[str, Any]]] = field(default_factory=queue.Queue)
    _executing: bool = False
    _shrinking: asyncio.Task[None] | None = None
    _shrinks: float = 0.0
    """When the disk that runs took is given back, by the loop's clock; at the start, too."""
    _warned: float = field(default_factory=time.monotonic)
    _shown: Mark | None = None

    def __post_init__(self) -> None:
        arguments = ("-m", "cloister_fl.server.service.run_executor", str(self.coordinator.root))
        self._executor = Child("run executor", arguments, environment(), self._events)
        arguments = ("-m", "cloister_fl.server.service.renewal_issuer", str(self.coordinator.root))
        self._issuer = Child("renewal issuer", arguments, environment(), queue.Queue())

    def _tend(self) -> bool:
        """Keep the run executor running; return whether it is ready."""
        self._executor.tend()
        while not self._events.empty():
            _, told = self._events.get_nowait()
            event = told.get("event")
            if event == "ready":
                self._executing = True
            elif event == "run-ended":
                self._shrinks = 0.0
            elif event == "ended" and told.get("status") != 0:
                # It ends by itself after each run, and is back in a moment.
                self._executing = False
            elif event in {"crashed", "failed"}:
                _log_failed("run executor", told)
        return self._executing

    def _issue(self) -> None:
        """Have the renewals issued that wait, by a process that ends when it is done."""
        issuer = self._issuer
        if issuer.pid is None and self.registry.renewals.waiting():
            issuer.tend()
        while not issuer.events.empty():
            _, told = issuer.events.get_nowait()
            if told.get("event") in {"crashed", "failed"}:
                _log_failed("renewal issuer", told)

    async def run(self, ready: Callable[[], None]) -> None:
        from cloister_fl.server.flower import superlink

        output_log.install((superlink.LOGGER,))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._stop.set)
        place, file = self.coordinator, self.coordinator.file
        self._require_roster()
        authority = x509.load_pem_x509_certificate(read_secret(place.keys / CA_CERTIFICATE))
        app, nodes = self._build()
        refusals = Refusals(place.refusals)
        nodes_now = self._approved()
        nodes.reconcile(*nodes_now)
        engine = Engine(
            app=app,
            node_key_header=superlink.NODE_KEY_HEADER,
            node_paths=frozenset(superlink.NODE_PATHS),
            signed=superlink.signed,
            push_messages=superlink.PUSH_MESSAGES,
            speaks_for_itself=superlink.speaks_for_itself,
            activate=superlink.ACTIVATE,
            begins=nodes.begins,
            confirm=superlink.CONFIRM,
            may_confirm=nodes.may_confirm,
        )
        roster = place.keys / "roster"
        fleet, enrolment = self._limiters = self._make_limiters(refusals)
        joining = EnrolmentApp(
            self.registry,
            refusals,
            authority=authority.fingerprint(hashes.SHA256()),
            authority_pem=pem(authority),
            root=place.federation_root(),
            roster=roster,
        )
        require_loopback(file.private.health)
        health = Health(file.private.health, place.health, "health below [private] in server.toml")
        watches = [loop.create_task(limiter.watch()) for limiter in self._limiters]
        try:
            private = listen(place.socket.parent, place.socket.name)
            await self._open("control", private_app(app), None, private, str(place.socket), "on")
            shapes = RequestShapes(functools.partial(update_bytes, place.root))
            desk = RenewalDesk(
                self.registry, authority.fingerprint(hashes.SHA256()), place.federation_root()
            )
            gate = FleetGate(engine, self.registry, refusals, roster, shapes, desk)
            public = bind(file.fleet.listen, fleet.context)
            await self._open("fleet", gate, fleet, public, file.fleet.listen)
            await self._follow(nodes, nodes_now, joining, enrolment)
            said = False
            while not self._stop.is_set():
                executing = self._tend()
                self._issue()
                health.serving(executing)
                if executing and not said:
                    said = True
                    ready()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), TICK_S)
                nodes_now = await self._follow(nodes, nodes_now, joining, enrolment)
                self._begin_to_shrink(nodes)
                self._warn()
        finally:
            health.serving(False)
            # First, while the engine it speaks with still answers.
            await asyncio.to_thread(self._executor.stop)
            await asyncio.to_thread(self._issuer.stop)
            health.close()
            for name in ("enrolment", "fleet", "control"):
                await self._close(name)
            for watch in watches:
                watch.cancel()
            refusals.close()

    def _build(self) -> tuple[Any, Any]:
        """Flower's application and its list of nodes; raises ServerFolderInvalid."""
        from cloister_fl.server.flower import superlink

        place = self.coordinator
        state = place.state / "flower.sqlite"
        try:
            return superlink.build(state, place.token(), place.executor_secret())
        except sqlite3.Error as error:
            raise unusable(state, error, _FLOWER_LOST) from None

    def _make_limiters(self, refusals: Refusals) -> list[ConnectionLimiter]:
        """Those of the public port and of the enrolment port, with the server's certificate."""
        keys = self.coordinator.keys
        chain, key = keys / SERVER_CERTIFICATE, keys / SERVER_KEY
        for secret in (chain, key):
            read_secret(secret)
        self._shown = mark_of(chain)
        known = server_context(chain, key, keys / CA_CERTIFICATE)
        return [
            ConnectionLimiter("fleet", known, refusals),
            ConnectionLimiter("enrolment", server_context(chain, key, None), refusals),
        ]

    def _begin_to_shrink(self, nodes: Any) -> None:
        """Give back the disk that a run took, beside all else: a slow disk takes seconds."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._shrinks:
            self._shrinks = math.inf
            self._shrinking = loop.create_task(self._shrink(nodes))

    async def _shrink(self, nodes: Any) -> None:
        if not await asyncio.to_thread(nodes.shrink):
            self._shrinks = min(self._shrinks, asyncio.get_running_loop().time() + AGAIN_S)

    def _warn(self) -> None:
        """Tell once a day of certificates whose end is near; ``start`` has told it at first."""
        if time.monotonic() - self._warned >= WARN_S:
            self._warned = time.monotonic()
            for line in warnings_of(self.coordinator):
                logging.getLogger(output_log.OWN).warning("%s", line)

    async def _follow(
        self,
        nodes: Any,
        before: _NodeKeys,
        joining: EnrolmentApp,
        limiter: ConnectionLimiter,
    ) -> _NodeKeys:
        """Apply changes of the database to nodes, connections and the enrolment port."""
        now = self._approved()
        if now != before:
            await asyncio.to_thread(nodes.reconcile, now.approved, now.known, now.renewed)
        self._show_renewed()
        for each in self._limiters:
            each.disconnect(self._ended())
        wanted = self.registry.open_invites() > 0
        if wanted and "enrolment" not in self._listeners:
            address = self.coordinator.file.enrolment.listen
            try:
                public = bind(address, limiter.context)
                await self._open("enrolment", joining, limiter, public, address)
            except ListenRefused as error:
                # Those who are in go on; it is tried again at the next look.
                logging.getLogger(output_log.OWN).warning("%s", error)
        elif not wanted and "enrolment" in self._listeners:
            limiter.disconnect()
            await self._close("enrolment")
        return now

    def _show_renewed(self) -> None:
        """Show the server's new certificate, where it was renewed, to whoever connects from now."""
        keys = self.coordinator.keys
        chain, key = keys / SERVER_CERTIFICATE, keys / SERVER_KEY
        mark = mark_of(chain)
        if mark is None or mark == self._shown:
            return
        self._shown = mark
        try:
            for limiter in self._limiters:
                limiter.context.load_cert_chain(chain, key)
        except (ssl.SSLError, OSError):
            # The one before is still shown.
            logging.getLogger("cloister").warning("%s cannot be used", SERVER_CERTIFICATE)

    def _approved(self) -> _NodeKeys:
        sites, renewals = self.registry.sites(), self.registry.renewals
        return _NodeKeys(
            {site.name: site.node_key for site in sites if site.state == "approved"},
            renewals.retired("node").union(site.node_key for site in sites),
            renewals.successors(),
        )

    def _ended(self) -> frozenset[bytes]:
        """Certificates that were revoked or replaced, by SHA-256."""
        return self.registry.renewals.retired("certificate").union(
            site.fingerprint
            for site in self.registry.sites()
            if site.state == "revoked" and site.fingerprint is not None
        )

    async def _open(
        self,
        name: str,
        app: Any,
        limiter: ConnectionLimiter | None,
        bound: socket.socket,
        address: str,
        lifespan: str = "off",
    ) -> None:
        listener = Listener(app, limiter, lifespan=lifespan)
        task = asyncio.get_running_loop().create_task(listener.serve(sockets=[bound]))
        while not listener.started and not task.done():
            await asyncio.sleep(0.02)
        if task.done():
            bound.close()
            await task
            raise ServerState(
                f"The server could not start to listen on {address}.",
                why="Its listener ended before it was ready.",
                remedy="Read the messages above, then start it again: "
                f"cloister server start{dir_option(self.coordinator.root)}",
            )
        self._listeners[name] = (listener, task)

    async def _close(self, name: str) -> None:
        if name in self._listeners:
            listener, task = self._listeners.pop(name)
            listener.should_exit = True
            await task

    def _require_roster(self) -> None:
        try:
            (self.coordinator.keys / "roster").read_bytes()
        except OSError:
            raise ServerFolderInvalid(
                "The folder has no signed roster.",
                remedy="Create it; no key is replaced: "
                f"cloister server init {shlex.quote(str(self.coordinator.root))}",
            ) from None


def _log_failed(name: str, told: Mapping[str, Any]) -> None:
    what = failure_in_words(told)
    logging.getLogger(output_log.OWN).warning("%s failed: %s", name, what)


def is_serving(coordinator: Coordinator) -> bool:
    """Ask the health service whether all ports are open, and runs can be executed."""
    return healthy(coordinator.file.private.health)
