"""grpc.health.v1, for Kubernetes' probes, container health checks and our own ``status``.

It is served on loopback alone, without TLS: it says one word and takes none.
"""

from __future__ import annotations

from typing import Any


class Health:
    """The health service of a process.

    Args:
        address: HOST:PORT on loopback; port 0 takes a free one.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, address: str) -> None:
        from concurrent import futures

        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        self._states: Any = health_pb2.HealthCheckResponse
        self._servicer = health.HealthServicer()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        self.serving(False)
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError:
            raise OSError(f"The health service cannot listen on {address}") from None
        self._server.start()

    def serving(self, now: bool) -> None:
        """Say SERVING or NOT_SERVING from now on."""
        state = self._states.SERVING if now else self._states.NOT_SERVING
        self._servicer.set("", state)

    def close(self) -> None:
        """Say NOT_SERVING, and stop."""
        self._servicer.enter_graceful_shutdown()
        self._server.stop(grace=0.5).wait()


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
