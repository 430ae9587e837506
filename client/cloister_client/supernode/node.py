"""Flower's SuperNode, embedded: the process of a site that talks with the coordinator.

Run as ``python -m cloister_client.supernode.node DIR PORT`` by ``service``. It holds the site's
TLS and node keys and no patient's data. What it changes in Flower:

- its connection shows the site's certificate, trusts the pinned authority alone, and goes through
  the site's proxy;
- no bundle is fetched: Flower is handed the installed wheel's own, and the executor refuses a run
  of any other;
- a task whose executor died is answered for as soon as the next executor asks, not a minute later;
- it waits less where there is something to do.
"""

from __future__ import annotations

import contextlib
import hmac
import importlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from flwr.common.constant import Status
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from cloister_client.joining import NODE_KEY, client_context, membership
from cloister_client.proxy import proxy_of
from cloister_client.site import Site, open_site
from cloister_client.supernode.names import FOREIGN, SUPEREXEC_SECRET
from cloister_common import eckeys
from cloister_common.bundle import bundle, bundle_hash
from cloister_common.children import child, tell
from cloister_common.eckeys import Purpose
from cloister_common.errors import CloisterError
from cloister_common.files import read_secret

_BUSY_S = 0.3
_IDLE_S = 2.0
_STAYS_BUSY_S = 60.0
_CONNECT_S = 10.0
_TURNED_AWAY = frozenset({401, 403, 503})
_ERRORS = 400
_WHO_I_AM = frozenset(
    {"/v1/fleet/activate-node", "/v1/fleet/send-node-heartbeat", "/v1/fleet/pull-messages"}
)


class Pace:
    """Flower sleeps three seconds between two looks; this sleeps less while a run goes on."""

    def __init__(self) -> None:
        self._stirred = time.monotonic() - _STAYS_BUSY_S

    def stir(self) -> None:
        """Something happened."""
        self._stirred = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """In place of ``time.sleep``."""
        if time.monotonic() - self._stirred < _STAYS_BUSY_S:
            time.sleep(min(seconds, _BUSY_S))
        else:
            time.sleep(min(seconds, _IDLE_S))


class NodeState(InMemoryNodeState):
    """Flower's state of a node, for exactly one executor.

    An executor that asks for a task has none. Where one is still running it belonged to an
    executor that died, and the coordinator is told at once.
    """

    def get_tasks(self, *args: Any, **wanted: Any) -> Any:
        """See Flower's; pending tasks are listed for an executor that asks for one."""
        if wanted.get("statuses") == [Status.PENDING]:
            with self.lock_task_store:
                for record in self.task_token_store.values():
                    record.active_until = now() - timedelta(seconds=1)
        return super().get_tasks(*args, **wanted)


class _States(NodeStateFactory):
    def state(self) -> Any:
        with self.lock:
            if self.state_instance is None:
                self.state_instance = NodeState(self.objectstore_factory.store())
            return self.state_instance


class Line:
    """Whether the coordinator answers, and lets this site in; told to the parent on a change."""

    def __init__(self) -> None:
        self._known = ""
        self._lock = threading.Lock()

    def answered(self, status: int) -> None:
        """It did, with this HTTP status."""
        if status in _TURNED_AWAY:
            self._now("offline", f"status {status}")
        elif status < _ERRORS:
            self._now("online", "")

    def failed(self, error: Exception) -> None:
        """It did not."""
        self._now("offline", type(error).__name__)

    def _now(self, state: str, why: str) -> None:
        with self._lock:
            if state + why != self._known:
                self._known = state + why
                tell(state, why=why)


def client_class(site: Site, line: Line, pace: Pace) -> type[FleetHttpClient]:
    """Flower's client of the Fleet API, over this site's own TLS."""

    class Client(FleetHttpClient):
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,
            interceptors: Any,
            *,
            retry_invoker: Any = None,
        ) -> Any:
            if insecure:
                raise ValueError("a node never speaks without TLS")
            made = cls(f"https://{server_address}", interceptors=interceptors)
            made._client.close()
            made._client = httpx.Client(
                verify=client_context(site),
                proxy=proxy_of(site),
                timeout=httpx.Timeout(60.0, connect=_CONNECT_S),
                follow_redirects=False,
            )
            return made

        def _send(self, *args: Any, **more: Any) -> Any:
            try:
                answer = super()._send(*args, **more)
            except httpx.HTTPError as error:
                line.failed(error)
                raise
            # Of the other paths, a 403 says no more than that a run has ended.
            if answer.request.url.path in _WHO_I_AM:
                line.answered(answer.status_code)
            return answer

        def PullMessages(self, request: Any) -> Any:  # noqa: N802  # Flower's name
            answer = super().PullMessages(request)
            if answer.messages_list:
                pace.stir()
            return answer

    return Client


def guarded(connection: Any) -> Any:
    """Flower's connection, with no way in for a bundle: what a hospital has, it does not fetch.

    A run of another bundle is marked as such and handed on with our own, so that the executor
    can answer for the site that it is refused.
    """

    @contextlib.contextmanager
    def connect(*args: Any, **more: Any) -> Iterator[Any]:
        with connection(*args, **more) as parts:
            node, receive, send, get_run, _, *rest = parts

            def own_run(run_id: int) -> Any:
                run = get_run(run_id)
                if not hmac.compare_digest(run.fab_hash, bundle_hash()):
                    tell("foreign-bundle", bundle=run.fab_hash[:16])
                    run.fab_id, run.fab_hash = FOREIGN, bundle_hash()
                return run

            def own_fab(fab_hash: str, run_id: int) -> Fab:
                del fab_hash, run_id
                return Fab(bundle_hash(), bundle(), {})

            yield (node, receive, send, own_run, own_fab, *rest)

    return connect


def serve_runtime(states: NodeStateFactory, port: int, secret: bytes) -> uvicorn.Server:
    """Serve Flower's Runtime API on loopback, in a thread, for the executor alone."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    app = create_app(states, superexec_auth_secret=secret)
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([bound],), daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return server


def main(folder: Path, port: int) -> None:
    """Run the node until the connection ends or SIGTERM comes."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.disabled = True
    site = open_site(folder)
    internal: Any = importlib.import_module("flwr.supernode.start_client_internal")
    states, pace, line = _States(ObjectStoreFactory()), Pace(), Line()
    connection: Any = fleet_http_connection
    connection.FleetHttpClient = client_class(site, line, pace)
    internal.time = SimpleNamespace(sleep=pace.sleep)
    internal.http_request_response = guarded(connection.http_request_response)
    serve_runtime(states, port, read_secret(site.keys / SUPEREXEC_SECRET))
    tell("ready")
    key = eckeys.load_private(read_secret(site.keys / NODE_KEY), Purpose.NODE)
    internal.start_client_internal(
        state_factory=states,
        server_address=membership(site).fleet,
        node_config={},
        root_certificates=None,
        insecure=False,
        authentication_keys=(key, key.public_key()),
        isolation="process",
        superexec_auth_secret=None,
        runtime_dependency_install=False,
    )


if __name__ == "__main__":
    with child():
        try:
            main(Path(sys.argv[1]), int(sys.argv[2]))
        except CloisterError as error:
            tell("failed", code=error.code, what=error.what, remedy=error.remedy)
            sys.exit(error.exit_status)
