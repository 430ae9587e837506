"""The wire between the product's ServerApp and its ClientApp, on which a test may act."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from cloister_fl import secagg
from cloister_fl.client.app import app
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from cloister_fl.protocol.round_messages import (
    EvaluateTask,
    Exchange,
    Exchanged,
    Prepare,
    Refusal,
    RoundMessage,
    TrainTask,
    pack,
    unpack,
)
from cloister_fl.secagg.messages.codec import Bundle, UnmaskRequest

OPEN = "enabled = false"
"""Lines of a study's table ``privacy`` that switch it off."""


class Between:
    """The product's ClientApp behind a wire on which a test may act.

    ``change`` sees each request before the site does, and may alter or drop it (None).
    """

    def __init__(
        self, change: Callable[[str, RoundMessage], RoundMessage | None] | None = None
    ) -> None:
        self.change = change
        self.replies: list[tuple[str, str, RoundMessage]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        task = unpack(message.content, Prepare, TrainTask, EvaluateTask, Exchange)
        changed = self.change(name, task) if self.change is not None else task
        if changed is None:
            raise ConnectionError
        if changed is not task:
            message.content = RecordDict(pack(changed))
        reply = app(message, context)
        answer = unpack(reply.content, Exchanged, Refusal) if task.kind != "prepare" else task
        self.replies.append((name, task.kind, answer))
        return reply


def asks_to_unmask(task: RoundMessage) -> bool:
    if not isinstance(task, Exchange):
        return False
    bundle = secagg.decode(task.exchange.data)
    assert isinstance(bundle, Bundle)
    return any(isinstance(part, UnmaskRequest) for part in bundle.parts)


def charges(out: Path, name: str) -> list[int]:
    """The rounds that a site's ledger was charged for, in order."""
    site = open_site(out / "sites" / name)
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    return [int(entry.body["round"]) for entry in ledger.entries() if entry.kind == "started"]
