"""Log of rejected connections and requests: one JSON line each, with a code of a closed list.

A line holds time, listener, code, the peer's address, and the site where a certificate named one.
Nothing that the peer sent is in it: what an outsider may write to a log is no log.
"""

from __future__ import annotations

import enum
import json
import logging
import logging.handlers
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

from cloister_fl.system import utc

MAX_FILE_BYTES = 8 << 20
KEPT_FILES = 5
LINES_A_SECOND = 20.0
"""Of one code; more are counted, and the count is in the next line."""


class Refused(enum.StrEnum):
    """Why a connection or request was rejected."""

    NO_CERTIFICATE = "no-certificate"
    FOREIGN_CERTIFICATE = "foreign-certificate"
    NOT_TLS = "not-tls-1.3"
    HANDSHAKE_FAILED = "handshake-failed"
    HANDSHAKE_SLOW = "handshake-slow"
    HANDSHAKES_TOO_MANY = "handshakes-too-many"
    CONNECTIONS_TOO_MANY = "connections-too-many"
    HEAD_SLOW = "head-slow"
    BODY_SLOW = "body-slow"
    CERTIFICATE_UNKNOWN = "certificate-unknown"
    CERTIFICATE_REVOKED = "certificate-revoked"
    CERTIFICATE_EXPIRED = "certificate-expired"
    PATH_REFUSED = "path-refused"
    CONTROL_REFUSED = "control-refused"
    RUNTIME_REFUSED = "runtime-refused"
    OTHER_NODE_KEY = "other-node-key"
    OTHER_NODE_NAME = "other-node-name"
    CONFIRMED_EARLY = "confirmed-early"
    BODY_TOO_LARGE = "body-too-large"
    OBJECTS_TOO_MANY = "objects-too-many"
    SIGNATURE_INVALID = "signature-invalid"
    BUSY = "busy"
    RATE = "rate-limited"
    MALFORMED = "malformed"
    PROOF_INVALID = "proof-invalid"
    INVITE_UNKNOWN = "invite-unknown"
    INVITE_USED = "invite-used"
    INVITE_EXPIRED = "invite-expired"
    KEY_IN_USE = "key-in-use"
    RENEWED_LATELY = "renewed-lately"
    ENGINE_REFUSED = "engine-refused"


@dataclass
class Allowance:
    """Lines of one kind: at most so many at once, and as many anew in so many seconds.

    Attributes:
        lines: how many.
        seconds: in which.
        level: lines that are left.
        at: when that was so, of the monotonic clock.
        dropped: lines that were not written since the last one.
    """

    lines: float
    seconds: float
    level: float = field(init=False)
    at: float = field(default_factory=time.monotonic)
    dropped: int = 0

    def __post_init__(self) -> None:
        self.level = self.lines

    def take(self) -> bool:
        """Whether a line may be written; counted where not."""
        now = time.monotonic()
        self.level = min(self.lines, self.level + (now - self.at) * self.lines / self.seconds)
        self.at = now
        if self.level < 1:
            self.dropped += 1
            return False
        self.level -= 1
        return True


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """A rotating file that only its owner can read."""

    def _open(self) -> TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(handle, "a", encoding="utf-8")


class Refusals:
    """The log; ``folder/refused.jsonl`` and five older files of 8 MiB."""

    def __init__(self, path: Path) -> None:
        self._handler = _PrivateFile(
            path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8"
        )
        self._buckets: dict[Refused, Allowance] = defaultdict(lambda: Allowance(LINES_A_SECOND, 1))

    def tell(
        self,
        code: Refused,
        listener: str,
        peer: str,
        *,
        site: str | None = None,
        status: int | None = None,
    ) -> None:
        """Write one line.

        Args:
            code: why.
            listener: ``fleet`` or ``enrolment``.
            peer: the other end's IP address.
            site: the site whose certificate was shown, where there was one.
            status: the HTTP status that was answered, where there was one.
        """
        bucket = self._buckets[code]
        if not bucket.take():
            return
        line: dict[str, str | int] = {
            "time": utc.timestamp("milliseconds"),
            "event": "refused",
            "listener": listener,
            "code": code.value,
            "peer": peer,
        }
        if site is not None:
            line["site"] = site
        if status is not None:
            line["status"] = status
        if bucket.dropped:
            line["not_shown"] = bucket.dropped
            bucket.dropped = 0
        text = json.dumps(line)
        self._handler.emit(logging.LogRecord("refused", logging.WARNING, "", 0, text, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()
