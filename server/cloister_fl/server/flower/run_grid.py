"""The grid of a deployed run: each node's reply is fetched by itself, and bounded before reading.

Pinned to flwr 1.41.0. Flower's own grid fetches the replies of all nodes in one call, waits up to
two hours for the missing parts of one, and lets through whatever one of them makes a library
raise: one malformed reply ends a run, and takes the replies of that call with it. Here a reply that
is not whole yet keeps nobody waiting, and one that cannot be read is an error about that reply.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
from flwr.app import Array, Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

from cloister_fl.errors import MessageInvalid

CALL_S = 300.0
"""Seconds for one call to the SuperLink, which is on this machine, with all its repetitions."""
SMALL_REPLY = 1 << 20
"""Bytes that a reply may have before a run has said more."""

_FAILED_CALLS = 5
_AT_ONCE = 2
_CHUNK = "ArrayChunk"
_CHUNK_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
_OBJECTS_AROUND = 16
"""Most objects of a reply that are no piece of an array; an honest one has six."""
_OBJECT_AROUND_BYTES = 64 << 10
_PER_CHUNK_BYTES = 128
"""What an array says of each of its pieces: an id and an index."""
_KINDS = frozenset({"Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", _CHUNK})


@dataclass
class _Begun:
    """A reply of which a node has sent the head.

    Attributes:
        root: id of its outermost object, which is the message's own.
        missing: ids of the objects that are not here yet.
        contents: those that are, by id.
        size: their bytes.
    """

    root: str
    missing: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0


class RunGrid(HttpGrid):
    """Flower's grid over its Runtime API, for nodes of which one may lie.

    Args:
        address: of the Runtime API, on loopback.
        token: of the run's task.
    """

    def __init__(self, address: str, *, token: str) -> None:
        super().__init__(address, insecure=True, token=token)
        self._retry_invoker.max_time = CALL_S
        self._most_bytes = SMALL_REPLY
        self._begun: dict[str, _Begun] = {}
        self._failed: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(_AT_ONCE)

    def bound_replies(self, most_bytes: int) -> None:
        """Let no reply from now on hold more than ``most_bytes`` of arrays and values."""
        self._most_bytes = most_bytes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand over each message by itself; the ids, empty for one that was not taken."""
        # What several messages share is hashed once.
        with no_object_id_recompute():
            return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are whole by now; never wait for parts of one.

        Raises:
            MessageInvalid: a reply cannot be read. Ask for one at a time, to know whose it is and
                to lose no other.
        """
        replies = [self._pull(identifier) for identifier in message_ids]
        return [reply for reply in replies if reply is not None]

    def give_up(self, message_ids: Iterable[str]) -> None:
        """Drop what has come of replies that nobody waits for any more, here and at the server."""
        for identifier in message_ids:
            self._failed.pop(identifier, None)
            begun = self._begun.pop(identifier, None)
            if begun is not None:
                with contextlib.suppress(httpx.HTTPStatusError, httpx.TimeoutException):
                    self._runtime_client.ConfirmMessageReceived(
                        ConfirmMessageReceivedRequest(
                            node=self.node, run_id=self.run.run_id, message_object_id=begun.root
                        )
                    )

    def close(self) -> None:
        """Disconnect."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _push(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id
        self._check_message(message)
        try:
            (identifier,) = self._try_push_messages(self.run.run_id, [message])
        except (httpx.HTTPStatusError, httpx.TimeoutException, ObjectPushError):
            return ""
        return identifier or ""

    def _pull(self, identifier: str) -> Message | None:
        try:
            begun = self._whole(identifier)
            if begun is None:
                return None
            self.give_up([identifier])
            _check(begun.contents, self._most_bytes, self._most_objects)
            message = inflate_object_from_contents(begun.root, begun.contents)
            if not isinstance(message, Message):
                raise _unreadable()
            message.metadata.__dict__["_message_id"] = begun.root
            return message
        except (httpx.HTTPStatusError, httpx.TimeoutException):
            self._failed[identifier] += 1
            if self._failed[identifier] < _FAILED_CALLS:
                return None
            self.give_up([identifier])
            raise _unreadable() from None
        except httpx.TransportError:
            # The server is gone, which is no node's doing.
            raise
        except Exception:
            # Whatever a library makes of what a peer sent.
            self.give_up([identifier])
            raise _unreadable() from None

    def _whole(self, identifier: str) -> _Begun | None:
        """The reply to a message with all its objects; None while some are missing."""
        begun = self._begun.get(identifier)
        if begun is None:
            answer = self._runtime_client.PullMessages(
                PullAppMessagesRequest(message_ids=[identifier])
            )
            for message, tree in zip(
                answer.messages_list, answer.message_object_trees, strict=True
            ):
                if message.metadata.reply_to_message_id == identifier:
                    begun = self._begun[identifier] = _Begun(message.metadata.message_id)
                    begun.missing = _object_ids(tree, self._most_objects)
            if begun is None:
                return None
        # The outermost object is pushed last: while it is missing, nothing else is asked for.
        if begun.root in begun.missing and not self._fetch(begun, [begun.root]):
            return None
        missing = list(begun.missing)
        pairs = (missing[at : at + _AT_ONCE] for at in range(0, len(missing), _AT_ONCE))
        return begun if all(self._fetch(begun, pair) for pair in pairs) else None

    def _fetch(self, begun: _Begun, wanted: Sequence[str]) -> bool:
        """Fetch objects; True where all of them are there."""
        most = self._most_bytes + self._most_objects * _PER_CHUNK_BYTES
        most += _OBJECTS_AROUND * _OBJECT_AROUND_BYTES
        found = True
        for identifier, content in zip(wanted, self._pool.map(self._object, wanted), strict=True):
            if not content:
                found = False
                continue
            begun.size += len(content)
            if begun.size > most:
                raise _unreadable()
            begun.contents[identifier] = content
            begun.missing.remove(identifier)
        return found

    def _object(self, identifier: str) -> bytes:
        """The content of an object; empty where it has not come yet."""
        answer = self._runtime_client.PullObject(
            PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=identifier)
        )
        if not answer.object_found:
            raise _unreadable()
        return bytes(answer.object_content) if answer.object_available else b""

    @property
    def _most_objects(self) -> int:
        return _OBJECTS_AROUND + -(-self._most_bytes // _CHUNK_BYTES)


def _object_ids(tree: ObjectTree, most: int) -> list[str]:
    """The different ids in a tree.

    Raises:
        MessageInvalid: there are more than ``most`` nodes.
    """
    found: dict[str, None] = {}
    for number, node in enumerate(_nodes(tree), 1):
        if number > most:
            raise _unreadable()
        found[node.object_id] = None
    return list(found)


def _nodes(tree: ObjectTree) -> Iterator[ObjectTree]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children


def _check(contents: Mapping[str, bytes], most_bytes: int, most_objects: int) -> None:
    """Look at what objects say of themselves, before a library builds what they describe.

    An array lists its pieces by number, and may name one of 5 MiB a thousand times.

    Raises:
        MessageInvalid: an object is of a kind that no reply has, or large, or the arrays would be.
    """
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == _CHUNK:
            continue
        most = _OBJECT_AROUND_BYTES + most_objects * _PER_CHUNK_BYTES
        if kind not in _KINDS or len(content) > most:
            raise _unreadable()
        if kind == "Array":
            for number in json.loads(get_object_body(content, Array))["arraychunk_ids"]:
                total += len(contents[children[number]])
                if total > most_bytes + most_objects * _PER_CHUNK_BYTES:
                    raise _unreadable()


def _unreadable() -> MessageInvalid:
    return MessageInvalid("A node's answer cannot be read, or is larger than its study allows.")
