"""The application of the enrolment port: the authority's certificate, requests, and answers.

Whoever comes here has no certificate yet, so everything is small and rare: 8 KiB a body, a few
requests a minute from one address. What it refuses, it refuses with a code from a closed list.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path

from cloister_fl.errors import DeploymentError, EnrolmentRefused, MessageInvalid
from cloister_fl.membership.enrolment import (
    MAX_REQUEST_BYTES,
    PATH_AUTHORITY,
    PATH_ENROL,
    PATH_STATUS,
    Reply,
    Request,
    read_status,
)
from cloister_fl.server.coordinator.rejection_log import Refusals, Refused
from cloister_fl.server.coordinator.site_database import Registry, SiteRow
from cloister_fl.server.network.database_writes import written
from cloister_fl.server.network.fleet_gate import (
    ClientDisconnected,
    Receive,
    RequestRejected,
    Scope,
    Send,
    answer,
    pieces,
)
from cloister_fl.server.network.tls_listener import PEER, Peer, network_of

EACH_A_MINUTE = 60
ALL_A_MINUTE = 600
"""Requests in one minute: from one address, and from all together."""
_ADDRESSES = 4096


class _Rate:
    """Counts requests in whole minutes."""

    def __init__(self) -> None:
        self._minute = 0
        self._all = 0
        self._each: OrderedDict[str, int] = OrderedDict()

    def exceeded(self, address: str) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._all = minute, 0
            self._each.clear()
        network = network_of(address)
        self._each[network] = self._each.get(network, 0) + 1
        if len(self._each) > _ADDRESSES:
            self._each.popitem(last=False)
        if self._each[network] > EACH_A_MINUTE:
            # Not counted for all: one who asks without end would use up the others' share.
            return True
        self._all += 1
        return self._all > ALL_A_MINUTE


class EnrolmentApp:
    """An ASGI application.

    Args:
        registry: the database.
        refusals: the log.
        authority: SHA-256 of the authority's certificate, 32 bytes.
        authority_pem: that certificate, PEM.
        root: the federation's root key, 32 bytes.
        roster: the file of the signed roster in force.
    """

    def __init__(
        self,
        registry: Registry,
        refusals: Refusals,
        *,
        authority: bytes,
        authority_pem: bytes,
        root: bytes,
        roster: Path,
    ) -> None:
        self._registry = registry
        self._refusals = refusals
        self._authority = authority
        self._authority_pem = authority_pem
        self._root = root
        self._roster = roster
        self._rate = _Rate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        peer: Peer = scope["state"][PEER]
        try:
            if self._rate.exceeded(peer.address):
                raise RequestRejected(Refused.RATE)
            body = await self._body(scope, receive)
            await answer(send, 200, await self._judge(scope, body))
        except RequestRejected as rejected:
            self._refusals.tell(rejected.code, "enrolment", peer.address, status=rejected.status)
            await answer(send, rejected.status, rejected.code.value.encode(), close=True)
        except ClientDisconnected:
            return

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        body = bytearray()
        async for piece in pieces(scope, receive, MAX_REQUEST_BYTES):
            body += piece
        return bytes(body)

    async def _judge(self, scope: Scope, body: bytes) -> bytes:
        asked = (scope["method"], scope["path"])
        try:
            if asked == ("GET", PATH_AUTHORITY):
                return self._authority_pem
            if asked == ("POST", PATH_ENROL):
                return await self._enrol(Request.decode(body))
            if asked == ("POST", PATH_STATUS):
                invite_id, identity = read_status(body, self._authority)
                return self._reply(self._registry.asker(invite_id, identity))
        except MessageInvalid:
            raise RequestRejected(Refused.MALFORMED) from None
        except EnrolmentRefused as refused:
            raise RequestRejected(Refused(refused.why)) from None
        except DeploymentError:
            # Of the database: another process writes to it, or its disk is full.
            raise RequestRejected(Refused.BUSY) from None
        raise RequestRejected(Refused.PATH_REFUSED)

    async def _enrol(self, request: Request) -> bytes:
        if not request.proven(self._authority, self._root):
            raise RequestRejected(Refused.PROOF_INVALID)
        return self._reply(await written(self._registry, lambda: self._registry.use(request)))

    def _reply(self, site: SiteRow) -> bytes:
        if site.state != "approved" or site.certificate is None:
            return Reply(site.state).encode()
        return Reply(site.state, site.certificate, self._roster.read_bytes()).encode()
