"""Status of a site's service, as its file says it."""

from __future__ import annotations

from dataclasses import dataclass, field

OFFLINE = {
    "status 401": "the coordinator refuses this site's signed time, because one of the two clocks "
    "is wrong, or does not know its node key; `cloister client check` says which",
    "status 403": "the coordinator has revoked this site, or its certificate has expired",
    "status 503": "the coordinator is busy",
    "ConnectError": "the coordinator does not answer",
    "ConnectTimeout": "the coordinator does not answer",
    "ProxyError": "the proxy does not let the connection through",
}
"""Why the coordinator does not answer, in words, by what the node tells."""


@dataclass
class ServiceStatus:
    """Status of the service; written to ``run/service.json``.

    Attributes:
        health: address of grpc.health.v1.
        node: whether the node runs.
        executor: whether the executor runs and has reached the node.
        online: whether the coordinator answers.
        why: why not, in words.
        approved: whether the coordinator has approved the site; before, nothing else happens.
        asked: messages that came, by kind.
        last_asked: when the last one came, seconds since 1970.
    """

    health: str
    node: bool = False
    executor: bool = False
    online: bool = False
    why: str = "the service is starting"
    approved: bool = False
    asked: dict[str, int] = field(default_factory=dict)
    last_asked: float = 0.0

    @property
    def serving(self) -> bool:
        """Whether a study could be trained now."""
        return self.node and self.executor and self.online
