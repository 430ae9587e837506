"""HTTP server of a local socket: for processes of this user alone, with bounded requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from cloister_fl.system.local_socket.socket_file import is_own

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class OwnUserHttp(H11Protocol):
    """HTTP/1.1 with a process of this user; a connection of another's is aborted."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, once the kernel has said who is there."""
        if is_own(transport.get_extra_info("socket")):
            super().connection_made(cast("asyncio.Transport", transport))
        else:
            cast("asyncio.Transport", transport).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what began."""
        if self.transport is not None:
            super().connection_lost(exc)


class RequestLimits:
    """An ASGI application before another: open paths, and the size of each one's requests.

    A body is read whole, within its limit, before the other application sees anything of it. Its
    host is replaced by ours: Starlette makes a request's URL of it, and Flower decides by that URL
    what to check, while the route follows the path.

    Args:
        app: the other application; its lifespan is passed on.
        limit_of: the most bytes that a body for this path has, or None where the path is closed.
    """

    def __init__(self, app: Application, limit_of: Callable[[str], int | None]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the lifespan on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            limit = self._limit_of(str(scope["path"]))
            if limit is None:
                await _refuse(send, 404)
                return
            try:
                body = await _body(scope, receive, limit)
            except ValueError:
                await _refuse(send, 413)
                return
            if body is not None:
                await self._app(_of_ours(scope), _once(body, receive), send)


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None where the other end left.

    Raises:
        ValueError: it is, or is said to be, larger than ``limit`` bytes.
    """
    said = [value for key, value in scope["headers"] if key == b"content-length"]
    if said and (not said[0].isdigit() or len(said[0]) > 12 or int(said[0]) > limit):
        raise ValueError
    held = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        held += event.get("body", b"")
        if len(held) > limit:
            raise ValueError
        if not event.get("more_body", False):
            return bytes(held)


def _once(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


def _of_ours(scope: Scope) -> Scope:
    kept = [(key, value) for key, value in scope["headers"] if key != b"host"]
    return {**scope, "headers": [*kept, (b"host", b"cloister")]}


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
