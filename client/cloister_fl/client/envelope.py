"""The envelope of each message at a site: log it, act, answer or refuse, and log the answer.

An error becomes a refusal with a reason of the closed list; its text stays at the site, as the last
refusal. Flower is never handed an exception: it would send the text to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from cloister_fl.client.app_state import Kept
from cloister_fl.client.site.audit_log import WHY, log_of
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.client.site.last_refusal import clear_last_refusal, keep_last_refusal
from cloister_fl.errors import (
    BudgetExhausted,
    BundleRefused,
    CloisterError,
    InternalError,
    MessageInvalid,
    OutsideHours,
    PolicyRefused,
    ReleaseAlreadySpent,
    RosterInvalid,
    RosterMismatch,
    RoundAlreadySpent,
    SecureAggregationError,
    StudyNotApproved,
    WireInvalid,
)
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    MessageT,
    Prepared,
    Refusal,
    Refused,
    RoundMessage,
    head_of,
    kind_of,
    pack,
    payload_bytes,
    payload_hash,
    signed_answer,
    unpack,
)

_REASONS: tuple[tuple[type[CloisterError], Refused], ...] = (
    (BundleRefused, Refused.BUNDLE),
    (PolicyRefused, Refused.POLICY),
    (StudyNotApproved, Refused.APPROVAL),
    (OutsideHours, Refused.HOURS),
    (BudgetExhausted, Refused.BUDGET),
    (RoundAlreadySpent, Refused.SPENT),
    (ReleaseAlreadySpent, Refused.SPENT),
    (MessageInvalid, Refused.MESSAGE),
    (WireInvalid, Refused.MESSAGE),
    (RosterMismatch, Refused.ROSTER),
    (RosterInvalid, Refused.ROSTER),
    (SecureAggregationError, Refused.PROTOCOL),
)
"""The first that fits; what is not here may depend on data and is declined without a reason."""


def answer_message(
    kept: Kept,
    message: Message,
    context: Context,
    kind: type[MessageT],
    handler: Callable[[Site, MessageT], RoundMessage],
) -> Message:
    """Unpack a message and hand it to its handler; whatever it raises becomes a refusal.

    Args:
        kept: what the app keeps between messages.
        message: as Flower hands it over.
        context: names the site's folder.
        kind: the type that the message must have.
        handler: gives the answer, or raises.
    """
    run: list[str] = []

    def act(site: Site) -> RoundMessage:
        task = unpack(message.content, kind)
        run.append(str(getattr(task, "run", "")))
        clear_last_refusal(site.root)
        return handler(site, task)

    return respond(kept, message, context, act, run)


def respond(
    kept: Kept,
    message: Message,
    context: Context,
    act: Callable[[Site], RoundMessage],
    run: Sequence[str] = (),
) -> Message:
    """Act, and log what leaves; ``act`` tells in ``run`` which run it is for, once it knows."""
    site: Site | None = None
    reply: RoundMessage
    try:
        site = open_site(Path(str(context.node_config[SITE_KEY])))
        # First, so that a site whose log cannot be written answers nothing.
        log_of(site).append("asked", **_described(message.content))
        reply = act(site)
    except CloisterError as error:
        reply = _refuse(site, error, context.node_id)
    except Exception as error:
        # The type alone: the text of a library's exception can quote what it was given.
        fault = InternalError(
            f"Internal error ({type(error).__name__}).",
            remedy="Report it, with the version of Cloister and the study file.",
        )
        reply = _refuse(site, fault, context.node_id)
    return Message(content=_logged(kept, site, reply, context.node_id, run), reply_to=message)


def _described(records: RecordDict) -> dict[str, str | int]:
    """What the log records of a message: its kind, size and hash, and the other side's head."""
    return {
        "message": kind_of(records),
        "bytes": payload_bytes(records),
        "sha256": payload_hash(records),
        "peer_head": head_of(records),
    }


def _logged(
    kept: Kept, site: Site | None, reply: RoundMessage, node: int, run: Sequence[str]
) -> RecordDict:
    """Pack a reply once the log says that it leaves, and why it may."""
    if site is None:
        return pack(reply)
    try:
        log = log_of(site)
        why = WHY[reply.kind]
        if isinstance(reply, Refusal):
            why = f"{why}: {reply.reason}"
        entry = {**_described(pack(reply)), "to": "coordinator", "why": why, "run": "".join(run)}
        del entry["peer_head"]
        head = log.append("sent", **entry)
        if isinstance(reply, Prepared) or kept.is_signature_due(site, head.seq):
            head = log.sign()
            kept.signed(site, head.seq)
    except CloisterError as error:
        # What is not in the log does not leave.
        return pack(_refuse(site, error, node))
    return pack(reply, log_head=log.note(head))


def _refuse(site: Site | None, error: CloisterError, node: int) -> Refusal:
    reason = next((r for kind, r in _REASONS if isinstance(error, kind)), Refused.DECLINED)
    if site is None:
        return Refusal(site="", reason=reason.value, signature=b"")
    keep_last_refusal(site.root, error)
    said = signed_answer(site.name, node, reason.value)
    return Refusal(site.name, reason.value, site.identity().sign(*said))
