"""How the process that executes a run stands on Flower: start it, take its task, get its grid."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.errors import InternalError
from cloister_fl.protocol.app_bundle import bundle, bundle_hash
from cloister_fl.server.flower.run_grid import RunGrid
from cloister_fl.system.local_socket.socket_client import local_client

_METHODS = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_SOON_S = 30.0
_HOST = "local"
_LARGEST = 64 << 20
"""Bytes of the server's largest answer; Flower sends a large object in pieces of 5 MiB."""


class _Bearer:
    """Shows the private token to Control."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        answer: httpx.Response = call_next(context)
        return answer


@contextlib.contextmanager
def running(server: Path, token: str, secret: bytes) -> Iterator[tuple[RunGrid, Context]]:
    """Start a run of the thin bundle, and give its grid and context; end it on the way out.

    Runs that an earlier process left behind are stopped first: their messages are answered by
    nobody any more.

    Args:
        server: socket of the server's Control and Runtime.
        token: what Control asks for.
        secret: what Runtime asks for.

    Raises:
        InternalError: Flower does not give the task.
        LocalSocketRefused: the socket is not this user's alone.
    """
    control: Any = ControlHttpClient.from_server_address(
        _HOST,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli"), _Bearer(token)],
    )
    _speak_at(server, control)
    with contextlib.closing(control._client):
        _stop_all(control)
        fab = fab_to_proto(Fab(bundle_hash(), bundle(), {}))
        started = control.StartRun(StartRunRequest(fab=fab))
        if not started.HasField("run_id"):
            raise _unexpected("did not start a run")
        try:
            yield from _executing(server, secret, started.run_id)
        finally:
            with contextlib.suppress(httpx.HTTPError):
                _stop_all(control, only=started.run_id)


def _executing(server: Path, secret: bytes, run_id: int) -> Iterator[tuple[RunGrid, Context]]:
    grid = RunGrid(_HOST, token=_task(server, secret, run_id))
    client = grid._runtime_client
    _speak_at(server, client)
    beats = HeartbeatSender(functools.partial(_beat, client))
    beats.start()
    done = SubStatus.FAILED
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        if given.run.fab_hash != bundle_hash():
            raise _unexpected("returned another application bundle")
        TaskIdentity.task_id = given.task_id
        TaskIdentity.run_id = given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        context = context_from_proto(given.context)
        grid.set_run(run_from_proto(given.run))
        yield grid, context
        done = SubStatus.COMPLETED
    finally:
        beats.stop()
        with contextlib.suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=done, details=""))
        grid.close()


def _task(server: Path, secret: bytes, run_id: int) -> str:
    """Take the run's task, for which a token is given once."""
    asks = RuntimeHttpClient.from_server_address(
        server_address=_HOST,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_METHODS),
        ],
    )
    _speak_at(server, asks)
    with contextlib.closing(asks):
        end = time.monotonic() + _SOON_S
        while time.monotonic() < end:
            found = asks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if found.HasField("task") and found.token and found.task.run_id == run_id:
                return str(found.token)
            time.sleep(0.2)
    raise _unexpected("gave no task for the run")


def _speak_at(server: Path, client: Any) -> None:
    """Have a client of Flower's speak with a socket's server, and with nobody else."""
    client._client.close()
    client._client = local_client(server.parent, server.name, _LARGEST)


def _stop_all(control: Any, only: int | None = None) -> None:
    for run_id, run in control.ListRuns(ListRunsRequest()).run_dict.items():
        if run.status.status != "finished" and only in {None, run_id}:
            with contextlib.suppress(httpx.HTTPStatusError):
                control.StopRun(StopRunRequest(run_id=run_id))


def _beat(client: RuntimeHttpClient) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True


def _unexpected(what: str) -> InternalError:
    return InternalError(
        f"Flower's SuperLink {what}.",
        remedy="Restart the server: cloister server stop, then cloister server start.",
    )
