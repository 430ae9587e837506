"""Health of a service: grpc.health.v1 for probes that speak it, and a file for all that need not.

The port is served on loopback alone, without TLS: it says one word and takes none. The file says
the same word, with the time at which the service's own loop last wrote it, so a service that hangs
or was killed is not taken for one that serves. Reading it starts no library::

    python -I -m cloister_fl.system.health FILE      # exit status 0 while the service serves

That is what containers ask every minute; a command of ``cloister`` costs a hundred times as much.
"""

from __future__ import annotations

import os
import sys
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:  # a health check is to cost the start of Python, and no more
    from pathlib import Path
    from typing import Any

FILE = "health"
"""Name of the file, in the folder of what a service writes while it runs."""
BEAT_S = 10.0
"""How often the file is written while nothing changes."""
LATE_S = 60.0
"""After so long without, the service hangs."""
_BOOT = "/proc/sys/kernel/random/boot_id"
_LINE = 128
"""Bytes of the file, filled up: it is written in place, by one call."""
CONNECTIONS = 16
"""Connections that the port holds; more are closed at once."""
_HANDSHAKE_MS, _IDLE_MS, _AGE_MS, _GRACE_MS = 2_000, 10_000, 60_000, 2_000
_REQUEST_BYTES = 256
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_STREAMS = 4
_THREADS = 2
_LIMITS = {
    # Any account of the machine can connect, and a connection is a descriptor of the service.
    "grpc.max_allowed_incoming_connections": CONNECTIONS,
    "grpc.server_handshake_timeout_ms": _HANDSHAKE_MS,
    "grpc.max_connection_idle_ms": _IDLE_MS,
    "grpc.max_connection_age_ms": _AGE_MS,
    "grpc.max_connection_age_grace_ms": _GRACE_MS,
    "grpc.max_concurrent_streams": _STREAMS,
    "grpc.max_receive_message_length": _REQUEST_BYTES,
    "grpc.so_reuseport": 0,
}


class Health:
    """The health service of a process: ``Check`` for the empty name.

    ``Watch`` is not implemented: each watcher would be kept for as long as it likes.

    Args:
        address: HOST:PORT on loopback; port 0 takes a free one.
        file: where the same is told to ``told_in``; its folder must exist.
        setting: where a person writes another address, for the error.

    Raises:
        ListenRefused: the port cannot be had.
        OutputInTheWay: the file cannot be made.
    """

    def __init__(self, address: str, file: Path, setting: str) -> None:
        from concurrent import futures

        import grpc
        from grpc_health.v1 import health_pb2_grpc

        from cloister_fl.errors import ListenRefused
        from cloister_fl.system.files import unwritable

        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=_THREADS),
            options=list(_LIMITS.items()),
            maximum_concurrent_rpcs=CONNECTIONS * _STREAMS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer(), self._server)
        self._now: bool | None = None
        self._beat = 0.0
        try:
            self._handle = os.open(file, _WRITE, 0o600)
        except OSError as error:
            raise unwritable(file, error) from None
        self.serving(False)
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError:
            os.close(self._handle)
            raise ListenRefused(
                f"The health service cannot listen on {address}.",
                why="Another process uses the port, or the address is not of this machine.",
                remedy=f"Choose another: {setting}.",
            ) from None
        self._server.start()

    def serving(self, now: bool) -> None:
        """Say SERVING or NOT_SERVING from now on; to be repeated at least every ``LATE_S``."""
        beat = monotonic()
        if now == self._now and beat - self._beat < BEAT_S:
            return
        self._now, self._beat = now, beat
        word = "serving" if now else "not-serving"
        try:
            os.pwrite(self._handle, f"{word} {boot()} {beat:.0f}".ljust(_LINE).encode(), 0)
        except OSError:
            # A disk that is full: the file grows old, and says so.
            return

    def close(self) -> None:
        """Say NOT_SERVING, and stop."""
        self.serving(False)
        os.close(self._handle)
        self._server.stop(grace=0.5).wait()

    def _servicer(self) -> Any:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        states = health_pb2.HealthCheckResponse

        class Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
            def Check(servicer, request: Any, context: Any) -> Any:  # noqa: N802, N805
                if request.service:
                    context.abort(grpc.StatusCode.NOT_FOUND, "")
                return states(status=states.SERVING if self._now else states.NOT_SERVING)

            def Watch(servicer, request: Any, context: Any) -> Any:  # noqa: N802, N805
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "")

        return Servicer()


def healthy(address: str, timeout_s: float = 3.0) -> bool:
    """Whether the health service at an address says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    # No proxy for loopback, whatever the environment says.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def told_in(file: str | Path) -> str:
    """What a service's file says: ``serving``, or why it is not taken to serve, in words."""
    try:
        with open(file, "rb") as held:  # noqa: PTH123  # pathlib is a third of the whole check
            words = held.read(_LINE).decode("ascii").split()
        state, of, beat = words[0], words[1], float(words[2])
    except (OSError, ValueError, IndexError):
        return "not serving: the service has not run here"
    age = monotonic() - beat
    if of != boot() or age < -1:
        return "not serving: the service has not run since the machine started"
    if not age < LATE_S:
        return f"not serving: the service was last heard {age:.0f} s ago"
    return "serving" if state == "serving" else "not serving"


def boot() -> str:
    """What tells this start of the machine from others: the clock of the beats begins with it."""
    try:
        with open(_BOOT, "rb") as held:  # noqa: PTH123  # as above
            return held.read(64).decode("ascii").strip() or "-"
    except (OSError, ValueError):
        return "-"


if __name__ == "__main__":
    told = told_in(sys.argv[1] if len(sys.argv) > 1 else FILE)
    print(told)  # noqa: T201
    sys.exit(0 if told == "serving" else 1)
