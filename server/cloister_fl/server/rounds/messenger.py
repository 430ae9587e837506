"""Typed messages over a Flower ``Grid``: nodes online, tasks sent, replies collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from cloister_fl.audit_log import AuditLog, Value
from cloister_fl.errors import MessageInvalid
from cloister_fl.membership.roster import Roster
from cloister_fl.protocol.round_messages import (
    MessageT,
    Prepare,
    Refusal,
    Refused,
    RoundMessage,
    head_of,
    kind_of,
    pack_all,
    payload_bytes,
    payload_hash,
    reason_of,
    unpack,
)
from cloister_fl.server.rounds.answer_times import AnswerTimes
from cloister_fl.server.rounds.site_ledgers import LEDGER, LEDGER_CHANGED, known_ledgers
from cloister_fl.server.rounds.site_log_heads import COMPARES, heads_of_sites

TYPES: Mapping[str, str] = {
    "prepare": "query.prepare",
    "finish": "query.finish",
    "exchange": "query.exchange",
    "train": "train",
    "evaluate": "evaluate",
}
"""Flower's message type for each kind of task."""

SILENT = "silent"
"""The server's own reason for a site that did not answer in time."""

UNREADABLE = "unreadable"
"""The server's own reason for a site whose answer cannot be read, or is larger than it may be."""

_DECLINED = Refusal(site="", reason=Refused.DECLINED.value, signature=b"")
_SILENT = Refusal(site="", reason=SILENT, signature=b"")
_UNREADABLE = Refusal(site="", reason=UNREADABLE, signature=b"")
_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 2.0


@runtime_checkable
class BoundedGrid(Protocol):
    """What a grid has beyond Flower's where nodes are other people's machines."""

    def bound_replies(self, most_bytes: int) -> None:
        """Let no reply hold more bytes."""

    def give_up(self, message_ids: Iterable[str]) -> None:
        """Drop what has come of replies that nobody waits for any more."""


@dataclass(frozen=True)
class Reply(Generic[MessageT]):
    """Reply of one node.

    Attributes:
        node: Flower's id of the node.
        message: the typed answer, or a refusal. A node that failed, or that answered outside
            the agreed form, counts as one that declined.
    """

    node: int
    message: MessageT | Refusal


class Messenger:
    """Sends tasks to the nodes of the federation and collects their replies.

    Args:
        grid: Flower's grid, whichever engine stands behind it.
        log: the coordinator's audit log; every message is in it before it leaves.
        timeout: seconds after which a stage goes on without those who have not answered, at most;
            see ``AnswerTimes``. None waits for all.
        check: is called while replies are waited for, and may raise to end the run.

    Attributes:
        received: bytes of payload that came from each node so far.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        log: AuditLog | None = None,
        timeout: float | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._grid = grid
        self._log = log
        self._times = AnswerTimes(timeout)
        self._check = check or (lambda: None)
        self._most_bytes: int | None = None
        self.received: dict[int, int] = {}

    def bound_replies(self, most_bytes: int) -> None:
        """Let no answer from now on hold more bytes; one that does cannot be read."""
        self._most_bytes = most_bytes
        if isinstance(self._grid, BoundedGrid):
            self._grid.bound_replies(most_bytes)

    def nodes(self) -> list[int]:
        """The nodes that are online now."""
        return sorted(self._grid.get_node_ids())

    def wait_for_nodes(self, count: int, *, seconds: float = 120.0) -> list[int]:
        """Return the nodes online, as soon as there are ``count`` or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= count or time.monotonic() > deadline:
                return nodes
            time.sleep(0.2)

    def ask(
        self, nodes: Iterable[int], task: RoundMessage, answer: type[MessageT]
    ) -> list[Reply[MessageT]]:
        """Send ``task`` to each node and return the replies in the order of the node ids."""
        replies = self.stream(dict.fromkeys(nodes, task), answer)
        return sorted(replies, key=lambda reply: reply.node)

    def stream(
        self, tasks: Mapping[int, RoundMessage], answer: type[MessageT]
    ) -> Iterator[Reply[MessageT]]:
        """Send each node its task and give the replies as they come.

        Whoever lets go of a reply before it takes the next holds one vector at a time. A node whose
        answer cannot be read, or does not come in time, is given as one that refused, and costs no
        other its answer.
        """
        contents = pack_all(tasks.values(), log_head=self._note_sent(tasks))
        messages = [
            Message(
                content=content,
                dst_node_id=node,
                message_type=TYPES[task.kind],
                group_id=str(getattr(task, "round", 0)),
            )
            for (node, task), content in zip(tasks.items(), contents, strict=True)
        ]
        pushed = dict(zip(tasks, self._grid.push_messages(messages), strict=False))
        del contents, messages
        # One that Flower could not take has no id, and no answer.
        waiting = {node: identifier for node, identifier in pushed.items() if identifier}
        for node in tasks.keys() - waiting.keys():
            yield Reply(node, _DECLINED)
        stage = self._times.stage({node: task.kind for node, task in tasks.items()})
        pause = _POLL_SECONDS
        while waiting:
            before, began = len(waiting), time.monotonic()
            for node, identifier in list(waiting.items()):
                for reply in self._pull(node, identifier, answer):
                    del waiting[node]
                    stage.answered(node, counts=not isinstance(reply.message, Refusal))
                    yield reply
            late = stage.overdue(waiting)
            for node in late:
                self._drop(waiting.pop(node))
                yield self._unanswered(node, _SILENT)
            if len(waiting) < before:
                pause = _POLL_SECONDS
                continue
            self._check()
            # A look at many nodes takes its time, and most of it is left to those who answer.
            time.sleep(max(pause, min(_LONGEST_PAUSE_SECONDS, 2 * (time.monotonic() - began))))
            pause = min(_SLOWEST_POLL_SECONDS, 1.5 * pause)

    def note(self, kind: str, **body: Value) -> None:
        """Log an entry that is not a message, and sign the log."""
        if self._log is not None:
            self._log.append(kind, **body)
            self._log.sign()

    def heads(self, roster: Roster, seats: Mapping[int, str]) -> str:
        """What the log noted of the sites' own logs, see ``site_log_heads.heads_of_sites``.

        Raises:
            AuditLogDamaged: the log is not sound.
        """
        return heads_of_sites(self._log.entries(), roster, seats) if self._log is not None else ""

    def knows_ledger(self, site: str, ledger: str) -> bool:
        """Whether a site's privacy ledger is the one that it came with before; notes a new one.

        A site without one, or that was never here, is taken at its word.

        Args:
            site: the site's id.
            ledger: what it says, see ``Prepared.ledger``; empty where privacy is off.

        Raises:
            AuditLogDamaged: the log is not sound, or cannot be written.
        """
        if self._log is None or not ledger:
            return True
        known = known_ledgers(self._log.entries())
        noted = known.get(site)
        if noted is None:
            self.note(LEDGER, site=site, ledger=ledger)
        elif ledger not in {noted.accepted, noted.offered}:
            self.note(LEDGER_CHANGED, site=site, ledger=ledger)
        return noted is None or ledger == noted.accepted

    def _note_sent(self, tasks: Mapping[int, RoundMessage]) -> str:
        """Log what is about to leave; the head, for the sites to note."""
        if self._log is None or not tasks:
            return ""
        # A site that says yes to such a message has compared its log, see ``site_log_heads``.
        compares = any(isinstance(task, Prepare) and task.heads for task in tasks.values())
        told: dict[str, Value] = {COMPARES: True} if compares else {}
        for task, nodes in _by_kind(tasks).items():
            listed = " ".join(map(str, nodes))
            head = self._log.append("sent", message=task[0], round=task[1], nodes=listed, **told)
        return self._log.note(head)

    def _pull(
        self, node: int, identifier: str, answer: type[MessageT]
    ) -> Iterator[Reply[MessageT]]:
        """The reply of one node, where it is there.

        By itself, so that what is wrong with it is wrong with it alone; and whose it is follows
        from the message that was sent, not from what the reply says of itself. Flower answers in
        its own name for a node that is gone.
        """
        try:
            replies = list(self._grid.pull_messages({identifier}))
        except MessageInvalid:
            yield self._unanswered(node, _UNREADABLE)
            return
        for reply in replies[:1]:
            yield self._read(node, reply, answer)

    def _drop(self, identifier: str) -> None:
        if isinstance(self._grid, BoundedGrid):
            self._grid.give_up([identifier])

    def _unanswered(self, node: int, refusal: Refusal) -> Reply[MessageT]:
        if self._log is not None:
            self._log.append("unanswered", node=node, reason=refusal.reason)
        return Reply(node, refusal)

    def _read(self, node: int, reply: Message, answer: type[MessageT]) -> Reply[MessageT]:
        if reply.has_error() or reply.metadata.src_node_id != node:
            return self._unanswered(node, _DECLINED)
        try:
            size = payload_bytes(reply.content)
            fits = self._most_bytes is None or size <= self._most_bytes
            read = (_said(reply.content), _typed(reply.content, answer)) if fits else None
        except Exception:
            # Whatever a library makes of what a peer sent.
            read = None
        if read is None:
            return self._unanswered(node, _UNREADABLE)
        said, message = read
        if self._log is not None:
            self._log.append("received", node=node, **said)
        self.received[node] = self.received.get(node, 0) + size
        return Reply(node, message)


def _said(records: RecordDict) -> dict[str, Value]:
    """What the log says of an answer."""
    reason = reason_of(records)
    return {
        "message": kind_of(records),
        "bytes": payload_bytes(records),
        "sha256": payload_hash(records),
        "peer_head": head_of(records),
        **({"reason": reason} if reason else {}),
    }


def _typed(records: RecordDict, answer: type[MessageT]) -> MessageT | Refusal:
    try:
        return unpack(records, answer)
    except MessageInvalid:
        try:
            return unpack(records, Refusal)
        except MessageInvalid:
            return _DECLINED


def _by_kind(tasks: Mapping[int, RoundMessage]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for node, task in tasks.items():
        found.setdefault((task.kind, int(getattr(task, "round", 0))), []).append(node)
    return found
