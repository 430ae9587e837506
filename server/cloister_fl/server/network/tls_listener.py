"""TLS 1.3 listener of a public port: HTTP after the handshake, with limits on both.

Connections come in plain and are upgraded here, so that a failed handshake can be told and
counted: an outsider without a certificate never gets beyond it. Handshakes under way are few, and
the oldest of the network that has most of them gives way, so whoever opens many and says nothing
pushes out their own. After it, a request's head and body have their times, and one certificate can
hold so many connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloister_fl.errors import ListenRefused
from cloister_fl.membership.enrolment import split_address
from cloister_fl.server.coordinator.rejection_log import Refusals, Refused
from cloister_fl.system.local_socket.socket_server import OwnUserHttp

BACKLOG = 64
"""Connections that the kernel holds for a port, and that asyncio accepts in one turn of its loop:
each has a descriptor before any limit is asked. Whoever finds it full tries again within seconds.
"""
PEER = "cloister_peer"
"""Where an application finds the ``Peer``, in the ASGI scope's ``state``."""


@dataclass(frozen=True)
class Limits:
    """Limits of one port; times in seconds.

    Attributes:
        handshake_s: for the TLS handshake.
        head_s: from a request's first byte, or a connection's beginning, to the end of its head.
        idle_s: between two requests on one connection.
        gap_s: between two pieces of a body.
        body_s: for a whole body.
        handshakes: handshakes under way.
        connections: connections beyond the handshake.
        each: of these, with one certificate, or from one address where there is none.
        head_bytes: of a request's head.
    """

    handshake_s: float = 10.0
    head_s: float = 10.0
    idle_s: float = 60.0
    gap_s: float = 20.0
    body_s: float = 300.0
    handshakes: int = 64
    connections: int = 512
    each: int = 16
    head_bytes: int = 16384


@dataclass(frozen=True)
class Peer:
    """Who is at the other end: an IP address, and SHA-256 of its certificate or nothing."""

    address: str
    fingerprint: bytes = b""


def server_context(chain: Path, key: Path, clients: Path | None) -> ssl.SSLContext:
    """TLS 1.3 only; with ``clients``, a certificate of that authority is asked of every client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no resumption: each connection shows its certificate
    context.load_cert_chain(chain, key)
    if clients is not None:
        context.load_verify_locations(clients)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def bind(address: str, context: ssl.SSLContext | None) -> socket.socket:
    """Listen on an address; without TLS on a literal loopback address only.

    Raises:
        ListenRefused: not loopback and no TLS, or the address cannot be had.
    """
    host, port = _parts(address) if context is not None else require_loopback(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ListenRefused(
            f"The server cannot listen on {address}.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Choose a free port and an address of this machine in server.toml.",
        ) from None


def require_loopback(address: str) -> tuple[str, int]:
    """Host and port of an address that is served without TLS.

    Raises:
        ListenRefused: it is not a literal loopback address.
    """
    host, port = _parts(address)
    if not _loopback(host):
        raise ListenRefused(
            f"{address} cannot be used without TLS.",
            why="Only a loopback address is allowed without it.",
            remedy="Write 127.0.0.1 in server.toml.",
        )
    return host, port


def _parts(address: str) -> tuple[str, int]:
    parts = split_address(address)
    if parts is None:
        raise ListenRefused(f"{address} is not HOST:PORT.", remedy="Correct it in server.toml.")
    return parts


class Listener(uvicorn.Server):
    """HTTP server of one port, in an event loop that it shares; its owner handles signals.

    Without a limiter it serves a UNIX socket, for processes of this user alone.
    """

    def __init__(
        self, app: Any, limiter: ConnectionLimiter | None, *, lifespan: str = "off"
    ) -> None:
        super().__init__(
            Config(
                app,
                http=cast("Any", limiter.protocol if limiter else OwnUserHttp),
                ws="none",
                loop="none",
                lifespan=cast("Any", lifespan),
                interface="asgi3",
                backlog=BACKLOG,  # else uvicorn's, 2048, whatever the socket was bound with
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=3600 if limiter else 75,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=limiter.limits.head_bytes if limiter else None,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ConnectionLimiter:
    """Limits the connections of one port, and disconnects those that stall."""

    def __init__(
        self, name: str, context: ssl.SSLContext, refusals: Refusals, limits: Limits | None = None
    ) -> None:
        self.name = name
        self.context = context
        self.limits = limits or Limits()
        self.inside: set[GuardedHttp] = set()
        self._refusals = refusals
        self._shaking: dict[_Handshake, None] = {}

    def protocol(self, **arguments: Any) -> asyncio.Protocol:
        """What uvicorn calls for a new connection."""
        return _Handshake(self, GuardedHttp(self, **arguments))

    def tell(self, code: Refused, peer: Peer) -> None:
        """Log a refusal at this port."""
        self._refusals.tell(code, self.name, peer.address)

    def began(self, handshake: _Handshake) -> None:
        """Count a handshake; where there are too many, an older one gives way to it.

        It is the oldest of the network that has most of them: whoever opens many pushes out their
        own first, and not a hospital that came before.
        """
        self._shaking[handshake] = None
        if len(self._shaking) > self.limits.handshakes:
            held = Counter(network_of(each.peer.address) for each in self._shaking)
            most = max(held, key=held.__getitem__)
            oldest = next(h for h in self._shaking if network_of(h.peer.address) == most)
            del self._shaking[oldest]
            self.tell(Refused.HANDSHAKES_TOO_MANY, oldest.peer)
            oldest.give_way()

    def ended(self, handshake: _Handshake) -> None:
        """A handshake succeeded or failed."""
        self._shaking.pop(handshake, None)

    def admits(self, peer: Peer) -> bool:
        """Whether one more connection of this peer is within the limits."""
        same = sum(1 for other in self.inside if _kin(other.peer) == _kin(peer))
        return len(self.inside) < self.limits.connections and same < self.limits.each

    def disconnect(self, fingerprints: frozenset[bytes] | None = None) -> None:
        """Abort the connections of these certificates, or all."""
        for connection in list(self.inside):
            if fingerprints is None or connection.peer.fingerprint in fingerprints:
                connection.transport.abort()

    async def watch(self) -> None:
        """Abort stalled connections until cancelled; runs as a task of its own."""
        while True:
            await asyncio.sleep(0.5)
            for connection in list(self.inside):
                code = connection.is_stalled(asyncio.get_running_loop().time())
                if code is not None:
                    self.tell(code, connection.peer)
                if code is not None or connection.idle_too_long:
                    connection.transport.abort()


class _Handshake(asyncio.Protocol):
    """A connection until TLS stands."""

    def __init__(self, limiter: ConnectionLimiter, http: GuardedHttp) -> None:
        self._limiter = limiter
        self._http = http
        self._task: asyncio.Task[None] | None = None
        self.peer = Peer("")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast("asyncio.Transport", transport)
        name = plain.get_extra_info("peername")
        self.peer = Peer(str(name[0]) if name else "")
        self._transport = plain
        self._limiter.began(self)
        self._task = asyncio.get_running_loop().create_task(self._shake(plain))

    def give_way(self) -> None:
        """End for the sake of a newer one."""
        # A task that is cancelled before its first turn never gets to close anything.
        self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    async def _shake(self, plain: asyncio.Transport) -> None:
        limiter = self._limiter
        try:
            secured = await asyncio.get_running_loop().start_tls(
                plain,
                self._http,
                limiter.context,
                server_side=True,
                ssl_handshake_timeout=limiter.limits.handshake_s,
            )
        except asyncio.CancelledError:
            plain.abort()
            return
        except OSError as error:
            limiter.tell(_reason(error), self.peer)
            plain.abort()
            return
        finally:
            limiter.ended(self)
        if secured is None or secured.is_closing():
            return
        shown = secured.get_extra_info("ssl_object").getpeercert(binary_form=True)
        fingerprint = hashlib.sha256(shown).digest() if shown else b""
        self._http.admit(secured, Peer(self.peer.address, fingerprint))


class GuardedHttp(H11Protocol):
    """HTTP/1.1 on a TLS connection, with its peer and a check whether it is stalled."""

    def __init__(self, limiter: ConnectionLimiter, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limiter = limiter
        self._early: list[bytes] = []
        self.peer = Peer("")
        self._partial = True  # a new connection owes a request
        self._ready = 0.0
        self._piece = 0.0

    def admit(self, transport: asyncio.Transport, peer: Peer) -> None:
        """Begin, or reject the peer where it has too many connections."""
        self.peer = peer
        self.app_state = {**self.app_state, PEER: peer}
        if not self._limiter.admits(peer):
            self._limiter.tell(Refused.CONNECTIONS_TOO_MANY, peer)
            transport.abort()
            return
        self._ready = self._piece = self.loop.time()
        self.connection_made(transport)
        self._limiter.inside.add(self)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.transport is None:
            # TLS stands and data came before ``admit`` had its turn.
            self._early.append(data)
            return
        self._piece = self.loop.time()
        if not self._busy and not self._partial:
            self._partial, self._ready = True, self._piece
        super().data_received(data)
        if self._busy:
            self._partial = False

    def on_response_complete(self) -> None:
        self._ready = self._piece = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limiter.inside.discard(self)
        if self.transport is not None:
            super().connection_lost(exc)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def idle_too_long(self) -> bool:
        """True where nothing was asked for a long time: no fault, but no right to stay."""
        idle = self.loop.time() - self._ready
        return not self._busy and idle > self._limiter.limits.idle_s

    def is_stalled(self, now: float) -> Refused | None:
        """The refusal to abort this connection for; None where it is not stalled."""
        limits = self._limiter.limits
        if not self._busy:
            slow = self._partial and now - self._ready > limits.head_s
            return Refused.HEAD_SLOW if slow else None
        if not self.cycle.more_body or self.flow.read_paused:
            return None
        slow = now - self._piece > limits.gap_s or now - self._ready > limits.body_s
        return Refused.BODY_SLOW if slow else None


def _kin(peer: Peer) -> bytes | str:
    return peer.fingerprint or network_of(peer.address)


def network_of(address: str) -> str:
    """What one party is taken to hold: an IPv4 address, or the /64 around an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: OSError) -> Refused:
    """Which refusal a failed handshake was."""
    reason = getattr(error, "reason", "") or ""
    if isinstance(error, ssl.SSLError):
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return Refused.NO_CERTIFICATE
        if reason == "CERTIFICATE_VERIFY_FAILED":
            return Refused.FOREIGN_CERTIFICATE
        if reason in {"UNSUPPORTED_PROTOCOL", "HTTP_REQUEST", "WRONG_VERSION_NUMBER"}:
            return Refused.NOT_TLS
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return Refused.HANDSHAKE_SLOW
    return Refused.HANDSHAKE_FAILED
