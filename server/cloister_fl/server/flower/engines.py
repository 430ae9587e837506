"""The one package of this side that touches what Flower does not promise to keep.

Pinned to flwr 1.41.0. ``superlink`` embeds the SuperLink. Here is what simulates: two engines run
the same ServerApp and ClientApp, an in-process grid that calls the ClientApp directly, and
Flower's own simulation engine on Ray.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cloister_fl.errors import CloisterError, ExtraMissing, InternalError, RunStopped
from cloister_fl.system.installation import install_command
from cloister_fl.system.libraries.imports import undisturbed_imports

_SERVER_NODE = 1
_TASK = 1
_ENDING_S = 60.0
_RAY_BACKEND = "flwr.server.superlink.fleet.vce.backend.raybackend"

_RAY_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_VARIABLES = (
    *("PYTHONPATH", "PYTHONBREAKPOINT", _RAY_CLUSTER),
    *("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_USAGE_STATS_ENABLED"),
)
_LOGS = ("flwr", "ray", "sqlalchemy", "filelock")
"""Variables and loggers that Ray and Flower's simulation engine change."""

ClientCallable = Callable[[Message, Context], Message]
NodeConfig = Mapping[str, str]
"""A node's own configuration; see the keys in ``round_messages``."""


class InProcessGrid(Grid):
    """A grid that calls the ClientApp in this process, one site after the other.

    Messages are deep-copied both ways, as a network would, so neither side can see the other's
    objects. An exception of the ClientApp becomes an error reply without its text.
    """

    def __init__(self, client_app: ClientCallable, nodes: Sequence[NodeConfig]) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(secrets.randbits(62))
        self._contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config={},
            )
            for node, config in enumerate(nodes, start=_SERVER_NODE + 1)
        }
        self._waiting: dict[str, Message] = {}
        _identify(self._run.run_id, _SERVER_NODE)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(
            content=content,
            message_type=message_type,
            dst_node_id=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identifier = secrets.token_hex(16)
            sent = copy.deepcopy(message)
            sent.metadata.__dict__["_message_id"] = identifier
            self._waiting[identifier] = sent
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the sites answer, one at a time: no more than one reply is held here."""
        wanted = set(message_ids)
        for identifier in [i for i in self._waiting if i in wanted]:
            yield self._deliver(self._waiting.pop(identifier))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        del timeout
        return list(self.pull_messages(self.push_messages(messages)))

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            _identify(self._run.run_id, node)
            return copy.deepcopy(self._client_app(message, self._contexts[node]))
        except Exception:
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="site failed")
            return Message(error, reply_to=message)
        finally:
            _identify(self._run.run_id, _SERVER_NODE)


def run_in_process(
    server_app: ServerApp,
    client_app: ClientCallable,
    nodes: Sequence[NodeConfig],
    run_config: dict[str, bool | float | int | str],
) -> None:
    """Run a whole federation in this process; errors of the ServerApp pass through."""
    grid = InProcessGrid(client_app, nodes)
    server_app(grid, _server_context(grid.run.run_id, run_config))


class NodesByPartition:
    """The ClientApp for Flower's simulation engine: gives each virtual node its configuration."""

    def __init__(self, client_app: ClientCallable, nodes: Sequence[NodeConfig]) -> None:
        self._client_app = client_app
        self._nodes = [dict(node) for node in nodes]

    def __call__(self, message: Message, context: Context) -> Message:
        partition = int(str(context.node_config["partition-id"]))
        context.node_config.update(self._nodes[partition])
        return self._client_app(message, context)


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientCallable,
    nodes: Sequence[NodeConfig],
    run_config: dict[str, bool | float | int | str],
    *,
    cpus_per_site: int = 1,
) -> None:
    """Run a whole federation on Flower's simulation engine, on loopback, without a dashboard.

    The working folder is another one meanwhile, so all paths must be absolute.

    Raises:
        ExtraMissing: Ray is not installed.
        CloisterError: whatever the ServerApp raised.
    """
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise ExtraMissing(
            "The engine 'ray' is not installed.", remedy=f"Run: {install_command('simulation')}"
        )
    with _host_put_back(), _empty_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run_on_ray(server_app, client_app, nodes, run_config, cpus_per_site)


def _run_on_ray(
    server_app: ServerApp,
    client_app: ClientCallable,
    nodes: Sequence[NodeConfig],
    run_config: dict[str, bool | float | int | str],
    cpus_per_site: int,
) -> None:
    with undisturbed_imports():
        from flwr.simulation.run_simulation import _run_simulation
        from flwr.supercore.constant import NOOP_FEDERATION_ID
        from flwr.supercore.telemetry import EventType

        importlib.import_module(_RAY_BACKEND)
    run = Run.create_empty(secrets.randbits(62))
    run.primary_task_id = _TASK
    run.federation_id = NOOP_FEDERATION_ID
    _identify(run.run_id, _SERVER_NODE)
    caught: list[BaseException] = []
    stop, threads = threading.Event(), list[threading.Thread]()
    guarded = _guarded(server_app, caught, stop, threads)
    backend = {
        "init_args": {
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "num_cpus": max(1, os.cpu_count() or 1),
            "log_to_driver": False,
            "logging_level": "error",
            "configure_logging": True,
        },
        "client_resources": {"num_cpus": cpus_per_site, "num_gpus": 0.0},
    }
    with _quiet_flower(), _pinned_actors():
        try:
            _run_simulation(
                num_supernodes=len(nodes),
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                client_app=NodesByPartition(client_app, nodes),  # type: ignore[arg-type]
                server_app=guarded,
                backend_name="ray",
                backend_config=backend,  # type: ignore[arg-type]
                server_app_context=_server_context(run.run_id, run_config),
                run=run,
            )
        except Exception:
            if not caught:
                raise InternalError(
                    "Flower's simulation engine failed.",
                    remedy="Run with --engine in-process, or look at Ray's own logs.",
                ) from None
        except BaseException:
            # An interrupt. Flower leaves the ServerApp's thread behind, waiting for the sites.
            stop.set()
            for thread in threads:
                thread.join(_ENDING_S)
            raise
    if caught:
        raise caught[0]


@contextlib.contextmanager
def _host_put_back() -> Iterator[None]:
    """Undo what Ray and Flower's engine change here; no telemetry, and nothing beyond loopback.

    They set variables of the environment, levels and handlers of their loggers, how the process
    ends on SIGTERM and how it shows an exception, and they draw random numbers. Flower decides on
    telemetry when it is imported, which a host may have done before us.
    """
    with contextlib.ExitStack() as undo:
        for name in _VARIABLES:
            undo.callback(_set_variable, name, os.environ.get(name))
        # Ray turns 127.0.0.1 into the machine's own address, and its servers then listen on every
        # interface, unless it believes that clusters are off. Its processes read the variable;
        # this one has read it when Ray was imported, which a host may have done before us.
        os.environ[_RAY_CLUSTER] = "0"
        with undisturbed_imports():
            ray = importlib.import_module("ray._private.ray_constants")
            telemetry = importlib.import_module("flwr.supercore.telemetry")
        for module, name, value in (
            (ray, "ENABLE_RAY_CLUSTER", False),
            (telemetry, "FLWR_TELEMETRY_ENABLED", "0"),
        ):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        for log in map(logging.getLogger, _LOGS):
            undo.callback(log.setLevel, log.level)
            undo.callback(setattr, log, "propagate", log.propagate)
            undo.callback(setattr, log, "handlers", list(log.handlers))
        undo.callback(setattr, sys, "excepthook", sys.excepthook)
        undo.callback(random.setstate, random.getstate())
        # Ray sets it in the main thread alone, and no other may.
        if threading.current_thread() is threading.main_thread():
            undo.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def _empty_folder() -> Iterator[None]:
    """Work in an empty folder of our own while Ray runs.

    Ray puts the working folder first on the module path of its processes, whatever they are told:
    a package of our import name that somebody left there would be run beside patients' images.
    """
    with tempfile.TemporaryDirectory(prefix="cloister-ray-") as folder, contextlib.chdir(folder):
        yield


def _guarded(
    server_app: ServerApp,
    caught: list[BaseException],
    stop: threading.Event,
    threads: list[threading.Thread],
) -> ServerApp:
    """Return a ServerApp that keeps what was raised, and its thread, and ends when it is told to.

    Args:
        server_app: what it runs.
        caught: gets what was raised.
        stop: set to end the run when it next asks for replies.
        threads: gets the thread that it runs in.
    """
    guarded = ServerApp()

    @guarded.main()
    def main(grid: Grid, context: Context) -> None:
        threads.append(threading.current_thread())
        pull = grid.pull_messages

        def pull_unless_stopped(message_ids: Iterable[str]) -> Iterable[Message]:
            if stop.is_set():
                raise RunStopped("The simulation was interrupted.")
            return pull(message_ids)

        grid.pull_messages = pull_unless_stopped  # type: ignore[method-assign]
        try:
            server_app(grid, context)
        except CloisterError as error:
            caught.append(error)
        except BaseException as error:
            caught.append(error)
            raise

    return guarded


@contextlib.contextmanager
def _pinned_actors() -> Iterator[None]:
    """Let every message of a virtual node go to the same Ray actor.

    A hospital's secrets of secure aggregation live in one process. Flower's pool hands a message
    to whichever actor is idle, and the next stage would meet a process that knows nothing of the
    one before. An actor takes its messages in turn, so no two work for a hospital at once.
    """
    backend: Any = importlib.import_module(_RAY_BACKEND)
    stock = backend.BasicActorPool

    class PinnedPool(stock):  # type: ignore[misc, valid-type]
        def submit(self, actor_fn: Any, job: tuple[Any, Message, str, Context]) -> Any:
            app_fn, message, partition, context = job
            actor = self.pool[int(partition) % len(self.pool)]
            return actor_fn(actor, app_fn, message, partition, context)

        def add_actor_back_to_pool(self, future: Any) -> None:
            """It never left."""

    backend.BasicActorPool = PinnedPool
    try:
        yield
    finally:
        backend.BasicActorPool = stock


@contextlib.contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs tracebacks of a site's exceptions; nothing of a site belongs in a log."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _server_context(run: int, config: dict[str, bool | float | int | str]) -> Context:
    return Context(
        run_id=run, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=config
    )


def _identify(run: int, node: int) -> None:
    TaskIdentity.task_id = _TASK
    TaskIdentity.run_id = run
    TaskIdentity.node_id = node
