"""A hospital's outbound proxy on loopback: it passes on, asks who, forbids, inspects or hangs."""

from __future__ import annotations

import base64
import contextlib
import datetime
import enum
import ipaddress
import socket
import ssl
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.coordinator_process import tls

INSPECTOR = "St. Elsewhere Web Gateway"


class Mode(enum.Enum):
    PASS = "pass"
    FORBID = "forbid"
    INSPECT = "inspect"
    HANG = "hang"
    CUT = "cut"
    BLOCK_PAGE = "block-page"


@dataclass
class Proxy:
    """A CONNECT proxy in threads; a context manager.

    Attributes:
        login: user and password that are asked for, or None.
        offers: how a login is asked for.
        targets: each host:port that somebody asked for, also in vain.
        carried: bytes passed on, both ways together.
    """

    mode: Mode = Mode.PASS
    login: tuple[str, str] | None = None
    offers: tuple[str, ...] = ('Basic realm="hospital"',)
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    targets: list[str] = field(default_factory=list)
    carried: int = 0
    _open: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._bound = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self._bound, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join(5)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._bound.getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._bound.accept()
            except OSError:
                return
            self._open.append(line)
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError), line:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = line.recv(4096)
                if not piece:
                    return
                head += piece
            method, target = head.split(b" ", 2)[:2]
            self.targets.append(target.decode())
            if self.mode is Mode.HANG:
                line.recv(1)
            elif self.mode is Mode.CUT:
                return
            elif method != b"CONNECT":
                line.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
            elif not self._knows(head):
                asked = "".join(f"Proxy-Authenticate: {offer}\r\n" for offer in self.offers)
                line.sendall(f"HTTP/1.1 407 Who?\r\n{asked}Content-Length: 0\r\n\r\n".encode())
            elif self.mode is Mode.FORBID:
                line.sendall(b"HTTP/1.1 403 \x1b[31mNo\r\nContent-Length: 0\r\n\r\n")
            elif self.mode is Mode.BLOCK_PAGE:
                line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                line.recv(4096)
                line.sendall(b"<html>Blocked</html>")
            else:
                self._through(line, target.decode())

    def _knows(self, head: bytes) -> bool:
        if self.login is None:
            return True
        word = base64.b64encode(":".join(self.login).encode())
        return b"proxy-authorization: basic " + word.lower() in head.lower() and word in head

    def _through(self, line: socket.socket, target: str) -> None:
        host, _, port = target.rpartition(":")
        try:
            far = socket.create_connection((host.strip("[]"), int(port)), 10)
        except OSError:
            line.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        far.settimeout(None)
        self._open.append(far)
        line.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with contextlib.ExitStack() as held:
            near: socket.socket = line
            held.enter_context(far)
            if self.mode is Mode.INSPECT:
                near = inspecting(host, self.newest).wrap_socket(line, server_side=True)
                held.enter_context(near)
                far = tls().wrap_socket(far, server_hostname=host)
                held.enter_context(far)
                self._open += [near, far]
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.carried += len(data)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def inspecting(host: str, newest: ssl.TLSVersion, *, days: int = 1) -> ssl.SSLContext:
    """TLS as an inspecting proxy speaks it: a certificate for the host, made on the spot."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, INSPECTOR + "\x1b[31m"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "St. Elsewhere"),
        ]
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]),
            critical=False,
        )
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inspector.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(path)
    return context
