"""HTTP client for requests to the coordinator: the answer, or the step that failed and why.

httpcore's trace tells which machine was dialled, so whether a proxy stands between is seen, not
guessed from settings. A failure names the step and the cause from a closed list; what a peer
wrote is quoted nowhere, but for the name of the authority that signed a certificate.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from cloister_fl.membership.enrolment import MAX_REPLY_BYTES

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 20.0
"""Between two bytes."""
LONGEST_S = 120.0
"""For a whole request: whoever answers, a proxy, too, could send a byte now and then."""

PLAIN = {"accept-encoding": "identity"}
"""Asks for an answer as it is; see ``is_coded``."""

_EXPIRED, _NOT_YET_VALID, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's X509_V_ERR_ numbers."""
_TOO_OLD = {"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "WRONG_SSL_VERSION"}
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_LOGINS = ("Basic", "Digest", "NTLM", "Negotiate", "Kerberos", "Bearer")


class Step(enum.IntEnum):
    """How far a request came; each is reached through those before."""

    NAME = 0
    CONNECT = 1
    PROXY = 2
    TLS = 3
    ANSWER = 4


class Cause(enum.Enum):
    """Why it came no further."""

    PROXY_SETTING = "proxy-setting"
    NAME_UNKNOWN = "name-unknown"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    NO_ROUTE = "no-route"
    CUT = "cut"
    PROXY_LOGIN = "proxy-login"
    PROXY_STATUS = "proxy-status"
    BEYOND_PROXY = "beyond-proxy"
    NO_TLS = "no-tls"
    UNTRUSTED = "untrusted"
    OTHER_NAME = "other-name"
    DATES = "dates"
    CERTIFICATE_REFUSED = "certificate-refused"
    TOO_LONG = "too-long"


_PROXY_SAYS = {407: Cause.PROXY_LOGIN, **dict.fromkeys((502, 503, 504), Cause.BEYOND_PROXY)}
_BY_KIND = (
    (socket.gaierror, Cause.NAME_UNKNOWN),
    (ConnectionRefusedError, Cause.REFUSED),
    (ConnectionError, Cause.CUT),
    (OSError, Cause.NO_ROUTE),
)


@dataclass(frozen=True)
class Seen:
    """A certificate that was presented and not believed.

    Attributes:
        issuer: common name or organisation of who signed it, printable, at most 80 characters.
        begins: not valid before.
        ends: not valid after.
    """

    issuer: str
    begins: datetime.datetime
    ends: datetime.datetime


@dataclass(frozen=True)
class Failure:
    """A request without an answer.

    Attributes:
        address: host:port of the coordinator that was asked for.
        step: the step that failed.
        cause: why.
        via: host:port of the proxy, or empty.
        status: what the proxy answered, or 0.
        user: whom the proxy was told that this is, or empty.
        logins: ways to log in that the proxy offers, as far as they are known.
        seen: the certificate presented, where it was not believed.
    """

    address: str
    step: Step
    cause: Cause
    via: str = ""
    status: int = 0
    user: str = ""
    logins: tuple[str, ...] = ()
    seen: Seen | None = None


@dataclass(frozen=True)
class Answer:
    """What the coordinator answered.

    Attributes:
        status: of HTTP.
        body: at most ``MAX_REPLY_BYTES``.
        headers: names in lower case.
        via: host:port of the proxy, or empty.
        sent: Unix time in seconds before the request was written, TLS already standing.
        received: Unix time in seconds when the answer's head was there.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    via: str
    sent: float
    received: float


def dial(
    context: ssl.SSLContext,
    method: str,
    address: str,
    path: str,
    body: bytes = b"",
    *,
    proxy: httpx.Proxy | None = None,
) -> Answer | Failure:
    """Ask once; nothing is followed, repeated or raised.

    Args:
        context: whom to believe, and this site's certificate if one is shown.
        method: of HTTP.
        address: host:port of the coordinator.
        path: of the URL.
        body: of the request.
        proxy: see ``proxy_of``; with ``None`` the environment decides.
    """
    import httpx

    watch, late = _Watch(address), threading.Event()
    user = proxy.auth[0] if proxy is not None and proxy.auth is not None else ""

    def failed(cause: Cause, **more: Any) -> Failure:
        step = watch.step
        if step is Step.NAME and cause is not Cause.NAME_UNKNOWN:
            step = Step.CONNECT  # the two are one call, and one event
        return Failure(address, step, cause, via=watch.via, user=user, **more)

    try:
        client = _client(context, proxy)
    except (ImportError, ValueError, httpx.InvalidURL):
        return Failure(address, Step.PROXY, Cause.PROXY_SETTING)
    try:
        with (
            client,
            _closed_when_late(client, late),
            client.stream(
                method, f"https://{address}{path}", content=body, extensions={"trace": watch}
            ) as response,
        ):
            if is_coded(response):
                return failed(Cause.TOO_LONG)
            answer = bytearray()
            for piece in response.iter_raw():
                answer += piece
                if len(answer) > MAX_REPLY_BYTES:
                    return failed(Cause.TOO_LONG)
            return Answer(
                response.status_code,
                bytes(answer),
                {name.lower(): value for name, value in response.headers.items()},
                watch.via,
                watch.sent,
                watch.received,
            )
    except httpx.ProxyError as error:
        status = int(found.group()) if (found := re.match(r"\d{3}\b", str(error))) else 0
        cause = _PROXY_SAYS.get(status, Cause.PROXY_STATUS)
        return failed(cause, status=status, logins=watch.logins)
    except (httpx.HTTPError, RuntimeError) as error:
        # RuntimeError: closed for it.
        cause = Cause.TIMEOUT if late.is_set() else _cause(error, watch.step)
        unproven = {Cause.UNTRUSTED, Cause.DATES, Cause.OTHER_NAME}
        return failed(cause, seen=presented(address, proxy) if cause in unproven else None)


def is_coded(answer: httpx.Response) -> bool:
    """Whether an answer is compressed, which nobody asked for: it could grow a millionfold."""
    return bool(answer.headers.get("content-encoding", "identity") != "identity")


def presented(address: str, proxy: httpx.Proxy | None) -> Seen | None:
    """The certificate that whoever answers shows, believed or not; no request is sent."""
    import httpx

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is sent here, so nobody need be believed, and old TLS does no harm.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    watch = _Watch(address, stop=True)
    try:
        with _client(context, proxy) as client, _closed_when_late(client, threading.Event()):
            client.get(f"https://{address}/", extensions={"trace": watch})
    except (_Stop, httpx.HTTPError, RuntimeError):
        pass
    return watch.seen


class _Stop(Exception):
    """TLS stands; that was all."""


@dataclass
class _Watch:
    """Follows httpcore through a request; see ``httpcore``'s trace extension."""

    address: str
    stop: bool = False
    step: Step = Step.NAME
    via: str = ""
    sent: float = 0.0
    received: float = 0.0
    logins: tuple[str, ...] = ()
    seen: Seen | None = field(default=None, repr=False)

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        part, _, name = event.partition(".")
        if event == "connection.connect_tcp.started":
            host, port = str(info["host"]), int(info["port"])
            dialled = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self.via = "" if dialled.lower() == self.address.lower() else dialled
        elif event == "connection.connect_tcp.complete":
            self.step = Step.PROXY if self.via else Step.TLS
        elif part == "proxy" and name == "start_tls.started":
            self.step = Step.TLS
        elif name == "start_tls.complete" and (part == "proxy" or not self.via):
            self.step = Step.ANSWER
            if self.stop:
                self._look(info["return_value"])
        elif name == "send_request_headers.started":
            self.sent = time.time()
        elif name == "receive_response_headers.complete":
            self.received = time.time()
            if self.step is Step.PROXY:
                self.logins = tuple(_offered(info["return_value"][3]))

    def _look(self, stream: Any) -> None:
        raw = stream.get_extra_info("ssl_object").getpeercert(True)
        stream.close()
        try:
            found = x509.load_der_x509_certificate(raw or b"")
            self.seen = Seen(_issuer(found), found.not_valid_before_utc, found.not_valid_after_utc)
        except ValueError:
            pass
        raise _Stop


def _client(context: ssl.SSLContext, proxy: httpx.Proxy | None) -> httpx.Client:
    import httpx

    return httpx.Client(
        verify=context,
        proxy=proxy,
        headers=PLAIN,
        timeout=TIMEOUT_S,
        follow_redirects=False,
    )


@contextlib.contextmanager
def _closed_when_late(client: httpx.Client, late: threading.Event) -> Iterator[None]:
    """Close a client that is still asking after ``LONGEST_S``, and say so by ``late``."""

    def close() -> None:
        late.set()
        client.close()

    timer = threading.Timer(LONGEST_S, close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _offered(headers: list[tuple[bytes, bytes]]) -> Iterator[str]:
    """The ways to log in that we know by name; a proxy's own words are not repeated."""
    said = b" ".join(
        value for name, value in headers if name.lower() == b"proxy-authenticate"
    ).lower()
    return (name for name in _LOGINS if re.search(rb"\b" + name.lower().encode() + rb"\b", said))


def _issuer(certificate: x509.Certificate) -> str:
    """Who signed it; terminal codes and the like cannot pass."""
    for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        for attribute in certificate.issuer.get_attributes_for_oid(kind):
            text = "".join(c for c in str(attribute.value) if c.isprintable())[:80].strip()
            if text:
                return text
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    here: BaseException | None = error
    while here is not None:
        yield here
        here = here.__cause__ or here.__context__


def _cause(error: BaseException, step: Step) -> Cause:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return Cause.TIMEOUT
    for each in _causes(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return _disbelief(each.verify_code)
        if isinstance(each, ssl.SSLError):
            return _tls(each.reason or "", step)
        for kind, cause in _BY_KIND:
            if isinstance(each, kind):
                return cause
    return Cause.CUT


def _disbelief(code: int) -> Cause:
    if code in {_EXPIRED, _NOT_YET_VALID}:
        return Cause.DATES
    return Cause.OTHER_NAME if code in {_OTHER_NAME, _OTHER_ADDRESS} else Cause.UNTRUSTED


def _tls(reason: str, step: Step) -> Cause:
    if step is Step.ANSWER and "ALERT" in reason:
        # TLS 1.3: the server judges the client's certificate when the client is done already.
        return Cause.CERTIFICATE_REFUSED
    if reason in _TOO_OLD:
        # The coordinator speaks 1.3 and no less; what inspects TLS often ends at 1.2.
        return Cause.UNTRUSTED
    return Cause.NO_TLS if reason in _NO_TLS else Cause.CUT
