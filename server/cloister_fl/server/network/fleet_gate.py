"""Access checks in front of Flower's application: which peer may request what, and at which port.

Flower's SuperNode authentication signs a time stamp and nothing else, so a header can be taken
from one connection to another. Here each request is held against the certificate that its
connection showed: the certificate must be an approved site's at this moment, and the node key in
the header must be that site's own. A renewed certificate holds from the first request that shows
it, and the one before ends with that.

A request meets the cheap checks first: certificate, path, key, signature, size, shape. Only what
passes all of them is parsed, or waits for the engine, one request of a site and path at a time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_fl.errors import DeploymentError, EnrolmentRefused, MessageInvalid
from cloister_fl.membership.enrolment import HEADER_PROTOCOL, HEADER_VERSION, PATH_ROSTER
from cloister_fl.membership.renewal_request import MAX_RENEWAL_BYTES, PATH_RENEW
from cloister_fl.server.coordinator.output_log import SITE
from cloister_fl.server.coordinator.rejection_log import Refusals, Refused
from cloister_fl.server.coordinator.site_database import Registry, SiteRow
from cloister_fl.server.coordinator.site_renewal import RenewalDesk
from cloister_fl.server.network.database_writes import written
from cloister_fl.server.network.request_shape import RequestShapes
from cloister_fl.server.network.request_turns import Turns
from cloister_fl.server.network.tls_listener import PEER, Peer
from cloister_fl.system.local_socket.socket_server import RequestLimits
from cloister_fl.version import PROTOCOL, __version__

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BUFFERED = 512 << 20
"""Bytes of bodies held at any time, over all connections."""
BUFFERED_EACH = 32 << 20
"""Of these, for one site; a node sends two pieces of 5 MiB at a time."""
PRIVATE_BODY = 16 << 20
"""Largest body at the loopback port, in bytes; the run executor sends pieces of 5 MiB, and the
heads of the messages to all sites at once."""

_STATUS = {
    Refused.PATH_REFUSED: 404,
    Refused.CONTROL_REFUSED: 404,
    Refused.RUNTIME_REFUSED: 404,
    Refused.OTHER_NODE_KEY: 401,
    Refused.SIGNATURE_INVALID: 401,
    Refused.CONFIRMED_EARLY: 409,
    Refused.BODY_TOO_LARGE: 413,
    Refused.OBJECTS_TOO_MANY: 413,
    Refused.BUSY: 503,
    Refused.RATE: 429,
    Refused.RENEWED_LATELY: 429,
    Refused.MALFORMED: 400,
}

_VERSIONS = (
    (HEADER_VERSION.encode(), __version__.encode()),
    (HEADER_PROTOCOL.encode(), str(PROTOCOL).encode()),
)


class RequestRejected(Exception):
    """Ends a request at once: it is rejected, with a code of the closed list."""

    def __init__(self, code: Refused) -> None:
        super().__init__(code.value)
        self.code = code

    @property
    def status(self) -> int:
        """The HTTP status to answer."""
        return _STATUS.get(self.code, 403)


class ClientDisconnected(Exception):
    """The peer closed the connection before its request was complete."""


@dataclass(frozen=True)
class Engine:
    """What the gate must know of Flower; see ``superlink.build``."""

    app: Application
    node_key_header: bytes
    node_paths: frozenset[str]
    signed: Callable[[Iterable[tuple[bytes, bytes]], bytes], bool]
    push_messages: str
    speaks_for_itself: Callable[[bytes], bool]
    activate: str
    begins: Callable[[bytes], None]
    confirm: str
    may_confirm: Callable[[bytes, bytes], bool]


class FleetGate:
    """The application of the public port, an ASGI one.

    Args:
        engine: Flower, and what is known of it.
        registry: the database of sites.
        refusals: the log.
        roster: the file of the signed roster in force.
        shapes: limits of the bodies.
        desk: takes renewals.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        refusals: Refusals,
        roster: Path,
        shapes: RequestShapes,
        desk: RenewalDesk,
    ) -> None:
        self._engine = engine
        self._desk = desk
        self._shapes = shapes
        self._turns = Turns()
        self._registry = registry
        self._refusals = refusals
        self._roster = roster
        self._held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        peer: Peer = scope["state"][PEER]
        site: SiteRow | None = None
        try:
            site = self._known(peer)
            # The request's own task alone sees it, and what works for it.
            SITE.set(site.name)
            path = self._path(scope)
            if path == PATH_ROSTER:
                # For enrolled sites alone: a version tells an outsider what to attack.
                await answer(send, 200, self._roster.read_bytes(), more=_VERSIONS)
                return
            if path == PATH_RENEW:
                await answer(send, 200, await self._renewed(scope, receive, peer, site))
                return
            self._own_key(scope, site)
            await self._own_signature(scope, site)
            await self._forward(scope, receive, send, peer, site)
        except RequestRejected as rejected:
            await self._reject(send, rejected, peer, site)
        except DeploymentError:
            # Of the database: another process writes to it, or its disk is full.
            await self._reject(send, RequestRejected(Refused.BUSY), peer, site)
        except ClientDisconnected:
            return

    async def _reject(
        self, send: Send, rejected: RequestRejected, peer: Peer, site: SiteRow | None
    ) -> None:
        name = site.name if site else None
        self._refusals.tell(rejected.code, "fleet", peer.address, site=name, status=rejected.status)
        await answer(send, rejected.status, rejected.code.value.encode(), close=True)

    def _known(self, peer: Peer) -> SiteRow:
        """The site whose certificate this is, as the database says now."""
        site = self._registry.by_certificate(peer.fingerprint)
        if site is None:
            site = self._registry.by_renewed(peer.fingerprint)
        if site is None:
            raise RequestRejected(Refused.CERTIFICATE_UNKNOWN)
        if site.state != "approved":
            raise RequestRejected(Refused.CERTIFICATE_REVOKED)
        if site.valid_until is None or site.valid_until <= time.time():
            raise RequestRejected(Refused.CERTIFICATE_EXPIRED)
        self._registry.saw(site)
        return site

    def _path(self, scope: Scope) -> str:
        path, method = str(scope["path"]), scope["method"]
        if (path in self._engine.node_paths and method == "POST") or (
            (method, path) in {("GET", PATH_ROSTER), ("POST", PATH_RENEW)}
        ):
            return path
        if path.startswith("/v1/control/"):
            raise RequestRejected(Refused.CONTROL_REFUSED)
        if path.startswith("/v1/runtime/"):
            raise RequestRejected(Refused.RUNTIME_REFUSED)
        raise RequestRejected(Refused.PATH_REFUSED)

    async def _renewed(self, scope: Scope, receive: Receive, peer: Peer, site: SiteRow) -> bytes:
        """The answer to a request for a certificate in place of the one that is shown."""
        body = bytearray()
        async with self._turns.of(site.name, PATH_RENEW):
            async for piece in pieces(scope, receive, MAX_RENEWAL_BYTES):
                body += piece
            try:
                request = await asyncio.to_thread(self._desk.read, site, bytes(body))
                # A slow body, or the wait, may have outlived the certificate.
                reply = await written(
                    self._registry, lambda: self._desk.take(self._known(peer), request)
                )
                return reply.encode()
            except MessageInvalid:
                raise RequestRejected(Refused.MALFORMED) from None
            except EnrolmentRefused as refused:
                raise RequestRejected(Refused(refused.why)) from None

    def _own_key(self, scope: Scope, site: SiteRow) -> None:
        shown = header(scope, self._engine.node_key_header)
        try:
            key = base64.b64decode(shown[0], validate=True) if len(shown) == 1 else b""
        except binascii.Error:
            key = b""
        if not hmac.compare_digest(key, site.node_key):
            raise RequestRejected(Refused.OTHER_NODE_KEY)

    async def _own_signature(self, scope: Scope, site: SiteRow) -> None:
        if not await asyncio.to_thread(self._engine.signed, scope["headers"], site.node_key):
            raise RequestRejected(Refused.SIGNATURE_INVALID)

    async def _require_fit(self, path: str, body: bytes) -> None:
        """Refuse a body by its shape, and a push that is not its sender's own reply."""
        if path != self._engine.push_messages:
            code = self._shapes.refusal(path, body)
        else:
            # The walk over a tree may read a file, and the rest parses: neither on the event loop.
            code = await asyncio.to_thread(self._shapes.refusal, path, body)
            if code is None and not await asyncio.to_thread(self._engine.speaks_for_itself, body):
                code = Refused.OTHER_NODE_NAME
        if code is not None:
            raise RequestRejected(code)

    async def _forward(
        self, scope: Scope, receive: Receive, send: Send, peer: Peer, site: SiteRow
    ) -> None:
        engine, path = self._engine, str(scope["path"])
        body = bytearray()
        try:
            async for piece in pieces(scope, receive, self._shapes.largest(path)):
                alone = self._held[site.name] + len(piece)
                if alone > BUFFERED_EACH or self._held.total() + len(piece) > BUFFERED:
                    raise RequestRejected(Refused.BUSY)
                self._held[site.name] = alone
                body += piece
            async with self._turns.of(site.name, path):
                whole = bytes(body)
                await self._require_fit(path, whole)
                await self._require_received(path, site, whole)
                # A slow body, or the wait, may have outlived the site's approval.
                self._known(peer)
                if path == engine.activate:
                    await asyncio.to_thread(engine.begins, site.node_key)
                status = await _replay(engine.app, scope, whole, receive, send)
        finally:
            self._held[site.name] -= len(body)
        if status in {401, 403}:
            self._refusals.tell(
                Refused.ENGINE_REFUSED, "fleet", peer.address, site=site.name, status=status
            )

    async def _require_received(self, path: str, site: SiteRow, body: bytes) -> None:
        """Let a confirmation pass only where the message is the site's own, and whole."""
        engine = self._engine
        if path == engine.confirm and not await asyncio.to_thread(
            engine.may_confirm, site.node_key, body
        ):
            raise RequestRejected(Refused.CONFIRMED_EARLY)


def private_app(app: Application) -> RequestLimits:
    """The application of the server's socket: Control, Runtime and their lifespan, no Fleet."""

    def limit_of(path: str) -> int | None:
        return PRIVATE_BODY if path.startswith(("/v1/control/", "/v1/runtime/")) else None

    return RequestLimits(app, limit_of)


def header(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header, whose name is in lower case."""
    return [value for key, value in scope["headers"] if key == name]


async def pieces(scope: Scope, receive: Receive, limit: int) -> Any:
    """Yield a body piece by piece; no more than ``limit`` bytes are ever taken.

    Raises:
        RequestRejected: it is, or is said to be, larger.
        ClientDisconnected: the peer left.
    """
    said = header(scope, b"content-length")
    if said and (not said[0].isdigit() or len(said[0]) > 12 or int(said[0]) > limit):
        raise RequestRejected(Refused.BODY_TOO_LARGE)
    taken = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            raise ClientDisconnected
        piece = event.get("body", b"")
        taken += len(piece)
        if taken > limit:
            raise RequestRejected(Refused.BODY_TOO_LARGE)
        yield piece
        if not event.get("more_body", False):
            return


async def answer(
    send: Send,
    status: int,
    body: bytes,
    *,
    close: bool = False,
    kind: bytes = b"text/plain",
    more: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Send a whole answer with ``more`` headers; ``close`` ends the connection after it."""
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *more,
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _replay(app: Application, scope: Scope, body: bytes, receive: Receive, send: Send) -> int:
    """Give an application a request whose body was read already; the status it answered."""
    given: Iterable[bytes] = (body,)
    waiting = iter(given)
    status = 0

    async def again() -> dict[str, Any]:
        piece = next(waiting, None)
        if piece is None:
            return await receive()
        return {"type": "http.request", "body": piece, "more_body": False}

    async def watched(event: dict[str, Any]) -> None:
        nonlocal status
        if event["type"] == "http.response.start":
            status = event["status"]
        await send(event)

    await app(_plain(scope), again, watched)
    return status


def _plain(scope: Scope) -> Scope:
    """The scope with a Host of ours.

    Starlette builds a request's URL from it, and Flower decides by that URL what to check, while
    the route follows the path: a Host with a slash in it would part the two.
    """
    kept = [(key, value) for key, value in scope["headers"] if key != b"host"]
    return {**scope, "headers": [*kept, (b"host", b"cloister")]}
