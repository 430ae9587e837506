"""Shapes of the requests of the Fleet API, judged on their bytes before anything parses them.

A parser pays for whatever a body holds: protobuf makes 30 times of some bodies, and Flower writes
each node of an object tree to its database, at 2 ms a node inside one transaction. So a body is
walked here first, field by field on the wire, and the walk ends at the first field that an honest
node does not send: unknown, given twice, longer than it can be, or one node of a tree too many.
What passes costs no more than its limits, whoever wrote it.

Source of the wire format: https://protobuf.dev/programming-guides/encoding/. The fields are those
of flwr 1.41.0; tests/unit/server/flower/test_pins.py holds this table against its messages.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from cloister_fl.server.coordinator.rejection_log import Refused

PIECE_BYTES = 5 << 20
"""Bytes of an array in one object: Flower cuts arrays at this size."""
TREE_NODES = 16
"""Nodes of a reply's object tree beside the pieces of its update; honest replies have six."""
TREE_DEPTH = 8
"""Levels of that tree: message, records, array record, array, piece; and some to spare."""

PUSH_MESSAGES = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"

LARGEST: Mapping[str, int] = {PUSH_MESSAGES: 64 << 10, PUSH_OBJECT: PIECE_BYTES + (4 << 10)}
"""Largest bodies, in bytes."""
LARGEST_OTHER = 4 << 10
"""Of every other request, in bytes."""


class _Tree:
    """Stands for an object tree in a shape."""


class _Seconds:
    """Stands for a number that is finite and not negative, as a double: Flower adds them up."""


_Shape: TypeAlias = "Mapping[int, int | re.Pattern[bytes] | _Seconds | _Tree | _Shape]"
"""By field number: the most bytes, the form of the bytes, or the shape of a nested message."""

_VARINT = 10
_SECONDS = _Seconds()
_ID = re.compile(rb"[0-9a-f]{64}")
_SESSION = re.compile(rb"[0-9a-f-]{36}")
_WORD = re.compile(rb"[a-z0-9._-]{0,64}")

_NODE: _Shape = {1: _VARINT}
_METADATA: _Shape = {
    1: _VARINT,  # run
    2: _ID,  # message
    3: _VARINT,  # source
    4: _VARINT,  # destination
    5: _ID,  # the message that it replies to
    6: _WORD,  # group: the round
    7: _SECONDS,  # time to live
    8: _WORD,  # type
    9: _SECONDS,  # created
    10: _VARINT,  # source task
    11: _VARINT,  # destination task
}
_ERROR: _Shape = {1: _VARINT, 2: 1024}
# A message travels without its content: that is in the objects.
_MESSAGE: _Shape = {1: _METADATA, 2: {}, 3: _ERROR}

SHAPES: Mapping[str, _Shape] = {
    "/v1/fleet/activate-node": {1: 1024, 2: _SECONDS},
    "/v1/fleet/deactivate-node": {1: _VARINT},
    "/v1/fleet/send-node-heartbeat": {1: _NODE, 2: _SECONDS},
    # Flower's second field, a list of messages to wait for, is sent by no node.
    "/v1/fleet/pull-messages": {1: _NODE},
    PUSH_MESSAGES: {1: _NODE, 2: _MESSAGE, 3: _Tree(), 4: _SECONDS},
    "/v1/fleet/get-run": {1: _NODE, 2: _VARINT},
    "/v1/fleet/get-fab": {1: _NODE, 2: _ID, 3: _VARINT},
    PUSH_OBJECT: {1: _NODE, 2: _VARINT, 3: _ID, 4: PIECE_BYTES + 1024, 5: _SESSION},
    "/v1/fleet/pull-object": {1: _NODE, 2: _VARINT, 3: _ID},
    "/v1/fleet/confirm-message-received": {1: _NODE, 2: _VARINT, 3: _ID},
}
"""What a node may send: every field at most once."""

_NEEDED: Mapping[str, frozenset[int]] = {PUSH_MESSAGES: frozenset({1, 2, 3})}
"""Fields without which Flower fails instead of refusing."""


class _Unfit(Exception):
    def __init__(self, code: Refused) -> None:
        super().__init__(code.value)
        self.code = code


@dataclass(frozen=True)
class RequestShapes:
    """Judges bodies.

    Attributes:
        update_bytes: tells how many bytes an update of the run under way has, 0 without a run.
            It may read a file; it is called only for a tree that is larger than ``TREE_NODES``.
    """

    update_bytes: Callable[[], int]

    def largest(self, path: str) -> int:
        """Largest body of a request, bytes."""
        return LARGEST.get(path, LARGEST_OTHER)

    def refusal(self, path: str, body: bytes) -> Refused | None:
        """Why a body is refused; None where it may be parsed.

        Args:
            path: one of ``SHAPES``; any other fits only an empty body.
            body: the whole body.
        """
        try:
            seen = self._walk(body, 0, len(body), SHAPES.get(path, {}))
            if not seen >= _NEEDED.get(path, frozenset()):
                raise _Unfit(Refused.MALFORMED)
        except _Unfit as unfit:
            return unfit.code
        return None

    def _walk(self, data: bytes, begin: int, end: int, shape: _Shape) -> set[int]:
        seen: set[int] = set()
        for number, start, stop in _fields(data, begin, end):
            expected = shape.get(number)
            if expected is None or number in seen:
                raise _Unfit(Refused.MALFORMED)
            seen.add(number)
            if isinstance(expected, _Tree):
                self._tree(data, start, stop)
            elif isinstance(expected, _Seconds):
                _require_seconds(data[start:stop])
            elif isinstance(expected, int):
                if stop - start > expected:
                    raise _Unfit(Refused.MALFORMED)
            elif isinstance(expected, re.Pattern):
                if expected.fullmatch(data, start, stop) is None:
                    raise _Unfit(Refused.MALFORMED)
            else:
                self._walk(data, start, stop, expected)
        return seen

    def _tree(self, data: bytes, begin: int, end: int) -> None:
        """Count the nodes of an object tree; no more are looked at than there may be."""
        most, asked = TREE_NODES, False
        waiting, found = [(begin, end, 1)], 1
        while waiting:
            start, stop, depth = waiting.pop()
            named = False
            for number, first, last in _fields(data, start, stop):
                if number == 1 and not named and _ID.fullmatch(data, first, last):
                    named = True
                elif number == 2 and depth < TREE_DEPTH:
                    found += 1
                    waiting.append((first, last, depth + 1))
                else:
                    raise _Unfit(Refused.MALFORMED)
                if found > most and not asked:
                    most, asked = TREE_NODES - (-self.update_bytes() // PIECE_BYTES), True
                if found > most:
                    raise _Unfit(Refused.OBJECTS_TOO_MANY)
            if not named:
                raise _Unfit(Refused.MALFORMED)


def _require_seconds(data: bytes) -> None:
    if len(data) != struct.calcsize("<d") or not 0 <= struct.unpack("<d", data)[0] < math.inf:
        raise _Unfit(Refused.MALFORMED)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Give number, begin and end of the value of each field between two places of a body."""
    while at < end:
        tag, at = _varint(data, at, end)
        kind, start = tag & 7, at
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 1:
            at += 8
        elif kind == 2:
            size, start = _varint(data, at, end)
            at = start + size
        elif kind == 5:
            at += 4
        else:
            raise _Unfit(Refused.MALFORMED)
        if at > end:
            raise _Unfit(Refused.MALFORMED)
        yield tag >> 3, start, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for shift in range(0, 7 * _VARINT, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Unfit(Refused.MALFORMED)
