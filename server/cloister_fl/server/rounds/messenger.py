"""Typed messages over a Flower ``Grid``: nodes online, tasks sent, replies collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

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
from cloister_fl.server.rounds.site_ledgers import LEDGER, LEDGER_CHANGED, known_ledgers
from cloister_fl.server.rounds.site_log_heads import COMPARES, heads_of_sites

TYPES: Mapping[str, str] = {
    "prepare": "query.prepare",
    "exchange": "query.exchange",
    "train": "train",
    "evaluate": "evaluate",
}
"""Flower's message type for each kind of task."""

_DECLINED = Refusal(site="", reason=Refused.DECLINED.value, signature=b"")
_POLL_SECONDS = 0.05
_SLOWEST_POLL_SECONDS = 0.5


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
        timeout: seconds after which a round goes on without those who have not answered;
            None waits for all.
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
        self._timeout = timeout
        self._check = check or (lambda: None)
        self.received: dict[int, int] = {}

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

        Whoever lets go of a reply before it takes the next holds one vector at a time.
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
        # Flower answers in its own name for a node that is gone, so whose answer a reply is follows
        # from the message; one that it could not take has no id, and no answer.
        waiting = {identifier: node for node, identifier in pushed.items() if identifier}
        for node in tasks.keys() - waiting.values():
            yield Reply(node, _DECLINED)
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        pause = _POLL_SECONDS
        while waiting and (deadline is None or time.monotonic() < deadline):
            before = len(waiting)
            for reply in self._grid.pull_messages(set(waiting)):
                asked = waiting.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:
                    yield self._read(asked, reply, answer)
            if len(waiting) < before:
                pause = _POLL_SECONDS
                continue
            self._check()
            time.sleep(pause)
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

    def _note_received(self, node: int, records: RecordDict) -> None:
        if self._log is None:
            return
        reason = reason_of(records)
        refused: dict[str, Value] = {"reason": reason} if reason else {}
        self._log.append(
            "received",
            node=node,
            message=kind_of(records),
            bytes=payload_bytes(records),
            sha256=payload_hash(records),
            peer_head=head_of(records),
            **refused,
        )

    def _read(self, node: int, reply: Message, answer: type[MessageT]) -> Reply[MessageT]:
        if reply.has_error() or reply.metadata.src_node_id != node:
            if self._log is not None:
                self._log.append("unanswered", node=node)
            return Reply(node, _DECLINED)
        self._note_received(node, reply.content)
        self.received[node] = self.received.get(node, 0) + payload_bytes(reply.content)
        message: MessageT | Refusal
        try:
            message = unpack(reply.content, answer)
        except MessageInvalid:
            try:
                message = unpack(reply.content, Refusal)
            except MessageInvalid:
                message = _DECLINED
        return Reply(node, message)


def _by_kind(tasks: Mapping[int, RoundMessage]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for node, task in tasks.items():
        found.setdefault((task.kind, int(getattr(task, "round", 0))), []).append(node)
    return found
