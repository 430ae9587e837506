"""Whoever answers in the coordinator's place takes neither a site's memory nor its time."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cloister_fl.client.flower import node
from cloister_fl.client.network import http
from cloister_fl.client.network.http import Answer, Cause, Failure, dial
from support.certificates import self_signed
from support.coordinator_process import tls

Deed = Callable[[socket.socket], object]
HEAD = b"HTTP/1.1 200 OK\r\n"
TWICE = gzip.compress(gzip.compress(bytes(64 << 20)))


@contextlib.contextmanager
def answering(deed: Deed, secured: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that reads a request and then does one deed."""
    bound = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = bound.accept()
                with contextlib.suppress(OSError), line, _over(line, secured) as told:
                    told.recv(65536)
                    deed(told)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{bound.getsockname()[1]}"
    finally:
        bound.shutdown(socket.SHUT_RDWR)
        bound.close()


def _over(line: socket.socket, secured: ssl.SSLContext | None) -> socket.socket:
    return secured.wrap_socket(line, server_side=True) if secured else line


def coded(line: socket.socket) -> None:
    head = HEAD + b"content-encoding: gzip, gzip\r\ncontent-length: %d\r\n\r\n" % len(TWICE)
    line.sendall(head + TWICE)


def drip(line: socket.socket) -> None:
    line.sendall(HEAD + b"x: ")
    while True:
        line.sendall(b"a")
        time.sleep(0.02)


def test_a_compressed_answer_does_not_fill_the_memory_of_who_joins(tmp_path: Path) -> None:
    """Of 2 KB, coded twice, 1.2 GB were made before anybody was believed."""
    context, _ = self_signed(tmp_path)
    tracemalloc.start()
    with answering(coded, context) as address:
        found = dial(tls(), "GET", address, "/v1/enrolment/authority")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found, Failure)
    assert found.cause is Cause.TOO_LONG
    assert most < 32 << 20


def test_a_compressed_or_endless_answer_does_not_fill_the_memory_of_the_node() -> None:
    def ask(deed: Deed) -> None:
        with (
            answering(deed) as address,
            httpx.Client(event_hooks={"response": [node.bound_answer]}) as client,
        ):
            client.post(f"http://{address}/v1/fleet/pull-object", content=b"x")

    def endless(line: socket.socket) -> None:
        line.sendall(HEAD + b"\r\n")
        while True:
            line.sendall(bytes(1 << 20))

    with pytest.raises(httpx.DecodingError):
        ask(coded)
    with pytest.raises(httpx.RemoteProtocolError):
        ask(endless)


@pytest.mark.parametrize("by_proxy", [False, True])
def test_an_answer_that_drips_does_not_hold_a_site_for_ever(
    by_proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte every 19 s kept a command, and the renewal of the certificate, for weeks."""
    monkeypatch.setattr(http, "LONGEST_S", 0.3)
    context, _ = self_signed(tmp_path)
    with answering(drip, None if by_proxy else context) as address:
        asked = "127.0.0.1:9" if by_proxy else address
        proxy = httpx.Proxy(f"http://{address}") if by_proxy else None
        began = time.monotonic()
        found = dial(tls(), "GET", asked, "/", proxy=proxy)
        assert isinstance(found, Failure)
        assert found.cause is Cause.TIMEOUT
        assert time.monotonic() - began < 5


def test_a_plain_answer_is_read(tmp_path: Path) -> None:
    context, _ = self_signed(tmp_path)
    body = HEAD + b"content-encoding: identity\r\ncontent-length: 2\r\n\r\nok"
    with answering(lambda line: line.sendall(body), context) as address:
        found = dial(tls(), "GET", address, "/")
    assert isinstance(found, Answer)
    assert (found.status, found.body) == (200, b"ok")
