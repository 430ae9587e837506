"""Flower SuperNode, embedded: the process of a site that talks with the coordinator.

Run as ``python -m cloister_fl.client.flower.node DIR`` by ``service``. It holds the site's TLS and
node keys and no patient's data. What it changes in Flower:

- its connection shows the site's certificate, trusts the pinned authority alone, and goes through
  the site's proxy;
- its Runtime API answers the executor on a UNIX socket in the site's folder, on no port, and of it
  only what the executor asks for, in requests of a bounded size;
- the id with which it came online is noted for the executor;
- no bundle is fetched: Flower is handed the installed wheel's own, and the executor refuses a run
  of any other;
- a task whose executor died is answered for as soon as the next executor asks, not a minute later;
- of a message that was half fetched, or a reply half handed over, nothing is left behind;
- it waits less where there is something to do.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from flwr.common.constant import Status
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from cloister_fl.client.flower.names import FOREIGN, LARGEST, RUN, SOCKET, SUPEREXEC_SECRET
from cloister_fl.client.flower.own_node import note_own_node
from cloister_fl.client.network.http import PLAIN, is_coded
from cloister_fl.client.network.join import client_context, membership
from cloister_fl.client.network.node_keys import node_key
from cloister_fl.client.network.proxy import proxy_of
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.errors import CloisterError
from cloister_fl.protocol.app_bundle import bundle, bundle_hash
from cloister_fl.system.child_process import child, tell, tell_failed
from cloister_fl.system.files import read_secret
from cloister_fl.system.local_socket.socket_client import BoundedStream
from cloister_fl.system.local_socket.socket_file import BACKLOG, listen
from cloister_fl.system.local_socket.socket_server import OwnUserHttp, RequestLimits

_BUSY_S = 0.3
_IDLE_S = 2.0
_STAYS_BUSY_S = 60.0
_CONNECT_S = 10.0
_TURNED_AWAY = frozenset({401, 403, 503})
_ERRORS = 400

ANSWER_BYTES = 16 << 20
"""Largest answer of the coordinator; Flower sends a large object in pieces of 5 MiB."""

_SMALL = 1 << 20
_RUNTIME = "/v1/runtime/"
REQUEST_LIMITS = {
    f"{_RUNTIME}acquire-task": _SMALL,
    f"{_RUNTIME}send-task-heartbeat": _SMALL,
    f"{_RUNTIME}pull-task-input": _SMALL,
    f"{_RUNTIME}pull-messages": _SMALL,
    f"{_RUNTIME}pull-object": _SMALL,
    f"{_RUNTIME}confirm-message-received": _SMALL,
    f"{_RUNTIME}push-messages": _SMALL,
    f"{_RUNTIME}push-object": LARGEST,
    f"{_RUNTIME}push-task-output": _SMALL,
}
"""What an executor asks for, and the most bytes of each request; nothing else is open."""


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
    executor that died, and the coordinator is told at once. A reply that such an executor had
    begun to hand over is no reply: Flower would send its head, and wait for the rest for ever.
    """

    def get_tasks(self, *args: Any, **wanted: Any) -> Any:
        """See Flower's; pending tasks are listed for an executor that asks for one."""
        if wanted.get("statuses") == [Status.PENDING]:
            for session in self._arriving().values():
                self._cleanup_push_session(session, cleanup_messages=True)
            with self.lock_task_store:
                for record in self.task_token_store.values():
                    record.active_until = now() - timedelta(seconds=1)
        return super().get_tasks(*args, **wanted)

    def get_messages_legacy(self, *args: Any, **wanted: Any) -> Any:
        """See Flower's; a reply is there once all of it is."""
        found = super().get_messages_legacy(*args, **wanted)
        with self.lock_msg_store:
            arriving = self._arriving()
            for message in found:
                entry = self.msg_store.get(message.metadata.message_id)
                if message.metadata.message_id in arriving and entry is not None:
                    entry.is_retrieved = False
        return [each for each in found if each.metadata.message_id not in arriving]

    def _on_task_tokens_expired(self, tasks: list[Any]) -> None:
        """See Flower's, which answers only for messages that the executor had looked at."""
        runs = {task.run_id for task in tasks}
        with self.lock_msg_store:
            for entry in self.msg_store.values():
                metadata = entry.message.metadata
                if metadata.run_id in runs and not metadata.reply_to_message_id:
                    entry.is_retrieved = True
        super()._on_task_tokens_expired(tasks)

    def _arriving(self) -> dict[str, str]:
        """Replies of which parts are missing: the session that hands them over, by message."""
        sessions = dict(self._object_push_sessions)
        return {
            root: session
            for root, session in dict(self._object_push_session_by_root).items()
            if session in sessions and sessions[session].pending_object_ids
        }


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
                headers=PLAIN,
                timeout=httpx.Timeout(60.0, connect=_CONNECT_S),
                follow_redirects=False,
                event_hooks={"response": [bound_answer]},
            )
            return made

        def _send(self, *args: Any, **more: Any) -> Any:
            try:
                answer = super()._send(*args, **more)
            except httpx.HTTPError as error:
                line.failed(error)
                raise
            line.answered(httpx.codes.OK if _run_ended(answer) else answer.status_code)
            return answer

        def PullMessages(self, request: Any) -> Any:  # noqa: N802  # Flower's name
            answer = super().PullMessages(request)
            if answer.messages_list:
                pace.stir()
            return answer

    return Client


def bound_answer(answer: httpx.Response) -> None:
    """Let no answer of the coordinator take the memory: ``httpx`` calls this before it reads one.

    Raises:
        httpx.HTTPError: it is compressed; or, while it is read, longer than ``ANSWER_BYTES``.
    """
    if is_coded(answer):
        raise httpx.DecodingError("the answer is compressed", request=answer.request)
    assert isinstance(answer.stream, httpx.SyncByteStream)
    answer.stream = BoundedStream(answer.stream, ANSWER_BYTES, answer.request)


def _run_ended(answer: httpx.Response) -> bool:
    """Whether it was a run that was turned away, not this site."""
    if answer.status_code != httpx.codes.FORBIDDEN:
        return False
    error = FlowerError.from_json(answer.text)
    return error is not None and error.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED


class RunEnded(Exception):
    """A run ended while one of its messages was fetched."""


def _ends(call: Any) -> Any:
    """A call whose run may have ended: an error like others, for which Flower cleans up.

    At its own, Flower leaves half a message and its task behind, and the executor that took the
    task waits for the other half for more than an hour.
    """

    @functools.wraps(call)
    def made(*args: Any) -> Any:
        try:
            return call(*args)
        except RunNotRunningException:
            raise RunEnded from None

    return made


def guarded(connection: Any, note: Callable[[int], None]) -> Any:
    """Flower's connection, with no way in for a bundle: what a hospital has, it does not fetch.

    A run of another bundle is marked as such and handed on with our own, so that the executor
    can answer for the site that it is refused. Nor does half a message stay behind.

    Args:
        connection: Flower's.
        note: is given the node's id before a message is asked for.
    """

    @contextlib.contextmanager
    def connect(*args: Any, **more: Any) -> Iterator[Any]:
        with connection(*args, **more) as parts:
            node, receive, send, get_run, _, pull, push, confirm = parts
            note(node)

            def own_run(run_id: int) -> Any:
                run = get_run(run_id)
                if not hmac.compare_digest(run.fab_hash, bundle_hash()):
                    tell("foreign-bundle", bundle=run.fab_hash[:16])
                    run.fab_id, run.fab_hash = FOREIGN, bundle_hash()
                return run

            def own_fab(fab_hash: str, run_id: int) -> Fab:
                del fab_hash, run_id
                return Fab(bundle_hash(), bundle(), {})

            yield (node, receive, send, own_run, own_fab, _ends(pull), push, _ends(confirm))

    return connect


def serve_runtime(states: NodeStateFactory, site: Site, secret: bytes) -> uvicorn.Server:
    """Serve Flower's Runtime API on the site's socket, in a thread, for the executor alone.

    Raises:
        LocalSocketRefused: the socket cannot be made, or others could use it.
    """
    bound = listen(site.root / RUN, SOCKET)
    app: Any = create_app(states, superexec_auth_secret=secret)
    config = uvicorn.Config(
        RequestLimits(app, REQUEST_LIMITS.get),
        http=OwnUserHttp,
        ws="none",
        loop="asyncio",
        interface="asgi3",
        backlog=BACKLOG,
        log_level="critical",
        access_log=False,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    return server


def main(folder: Path) -> None:
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
    internal.http_request_response = guarded(
        connection.http_request_response, functools.partial(note_own_node, site)
    )
    serve_runtime(states, site, read_secret(site.keys / SUPEREXEC_SECRET))
    tell("ready")
    key = node_key(site)
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
            main(Path(sys.argv[1]))
        except CloisterError as error:
            tell_failed(error)
            sys.exit(error.exit_status)
