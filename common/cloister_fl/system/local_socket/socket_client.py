"""HTTP client of a local socket, with bounded answers."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx

from cloister_fl.system.local_socket.socket_file import connect

URL = "http://local"
"""What requests name as their host: nobody looks it up."""

TIMEOUT_S = 30.0


def local_client(folder: Path, name: str, largest: int) -> httpx.Client:
    """Return a client whose requests all go to one local socket, whatever host they name.

    No proxy, redirect, compression or file of passwords has a part in it. A request raises
    ``LocalSocketRefused`` where the socket is not this user's, and else what httpx raises.

    Args:
        folder: folder of the socket, of mode 0700.
        name: name of the socket.
        largest: bytes of the largest answer.
    """
    return httpx.Client(
        transport=_Transport(folder, name, largest),
        timeout=TIMEOUT_S,
        trust_env=False,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
    )


class _Transport(httpx.HTTPTransport):
    """httpx's own, over connections that ``socket_file`` makes."""

    def __init__(self, folder: Path, name: str, largest: int) -> None:
        # In place of httpx's, which reads the authorities of TLS and offers no backend.
        self._pool = httpcore.ConnectionPool(
            uds=str(folder / name), network_backend=_Backend(folder, name)
        )
        self._largest = largest

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        said = answer.headers.get("content-length", "0")
        small = said.isascii() and said.isdigit() and len(said) <= 12 and int(said) <= self._largest
        if not small or "content-encoding" in answer.headers:
            answer.close()
            raise _too_large(request)
        assert isinstance(answer.stream, httpx.SyncByteStream)
        answer.stream = BoundedStream(answer.stream, self._largest, request)
        return answer


class BoundedStream(httpx.SyncByteStream):
    """An answer's body, read to so many bytes at most; longer raises RemoteProtocolError."""

    def __init__(self, stream: httpx.SyncByteStream, left: int, request: httpx.Request) -> None:
        self._stream = stream
        self._left = left
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._left -= len(piece)
            if self._left < 0:
                raise _too_large(self._request)
            yield piece

    def close(self) -> None:
        self._stream.close()


class _Backend(httpcore.SyncBackend):
    """Where httpcore gets its connections: one socket, and nowhere else."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        with _as(httpcore.ConnectTimeout, httpcore.ConnectError):
            return _Line(connect(self._folder, self._name, timeout))


class _Line(httpcore.NetworkStream):
    """A connected socket, as httpcore wants one."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as(httpcore.ReadTimeout, httpcore.ReadError):
            self._line.settimeout(timeout)
            return self._line.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as(httpcore.WriteTimeout, httpcore.WriteError):
            self._line.settimeout(timeout)
            self._line.sendall(buffer)

    def close(self) -> None:
        self._line.close()

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return None
        # Readable while nothing was asked: the other end has closed it.
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        return bool(poll.poll(0))


@contextlib.contextmanager
def _as(late: type[Exception], other: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise late from error
    except OSError as error:
        raise other(type(error).__name__) from error


def _too_large(request: httpx.Request) -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError("the answer is too large, or compressed", request=request)
