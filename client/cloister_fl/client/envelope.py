"""The envelope of each message at a site: log it, act, answer or refuse, and log the answer.

An error becomes a refusal with a reason of the closed list; its text stays at the site, as the last
refusal. Flower is never handed an exception: it would send the text to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from cloister_fl.client.app_state import Kept
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import WHY
from cloister_fl.errors import (
    BudgetExhausted,
    BundleRefused,
    CloisterError,
    InitialModelUnfit,
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
    described,
    head_of,
    pack,
    signed_answer,
    unpack,
    with_log_head,
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
    (InitialModelUnfit, Refused.MODEL),
    (RosterMismatch, Refused.ROSTER),
    (RosterInvalid, Refused.ROSTER),
    (SecureAggregationError, Refused.PROTOCOL),
)
"""The first that fits; what is not here is declined without a reason. Without privacy it may depend
on data; with privacy on, what data do is turned into absent patients before it comes here."""


def answer_message(
    kept: Kept,
    message: Message,
    context: Context,
    kind: type[MessageT],
    handler: Callable[[SiteSession, MessageT], RoundMessage],
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

    def act(session: SiteSession) -> RoundMessage:
        task = unpack(message.content, kind)
        run.append(str(getattr(task, "run", "")))
        session.clear_refusal()
        return handler(session, task)

    return respond(kept, message, context, act, run)


def respond(
    kept: Kept,
    message: Message,
    context: Context,
    act: Callable[[SiteSession], RoundMessage],
    run: Sequence[str] = (),
) -> Message:
    """Act, and log what leaves; ``act`` tells in ``run`` which run it is for, once it knows."""
    session: SiteSession | None = None
    reply: RoundMessage
    # One message at a time: a session is for one thread, and a charge is made once.
    with kept.turn:
        try:
            session = kept.session(Path(str(context.node_config[SITE_KEY])))
            # First, so that a site whose log was changed or cannot be written answers nothing.
            session.require_log()
            session.log.append(
                "asked", **described(message.content), peer_head=head_of(message.content)
            )
            reply = act(session)
        except CloisterError as error:
            reply = _refuse(session, error, context.node_id)
        except Exception as error:
            # The type alone: the text of a library's exception can quote what it was given.
            fault = InternalError(
                f"Internal error ({type(error).__name__}).",
                remedy="Report it, with the version of Cloister and the study file.",
            )
            reply = _refuse(session, fault, context.node_id)
        return Message(content=_logged(session, reply, context.node_id, run), reply_to=message)


def _logged(
    session: SiteSession | None, reply: RoundMessage, node: int, run: Sequence[str]
) -> RecordDict:
    """Pack a reply once the log says that it leaves, and why it may."""
    records = pack(reply)
    if session is None:
        return records
    why = WHY[reply.kind]
    if isinstance(reply, Refusal):
        why = f"{why}: {reply.reason}"
    try:
        # Also of a refusal: nothing is written behind a change that is not explained.
        session.require_log()
        head = session.log.append(
            "sent", **described(records), to="coordinator", why=why, run="".join(run)
        )
        head = session.sign_log(head, now=isinstance(reply, Prepared))
    except CloisterError as error:
        # What is not in the log does not leave.
        return pack(_refuse(session, error, node))
    return with_log_head(records, session.tell(head))


def _refuse(session: SiteSession | None, error: CloisterError, node: int) -> Refusal:
    reason = next((r for kind, r in _REASONS if isinstance(error, kind)), Refused.DECLINED)
    if session is None:
        return Refusal(site="", reason=reason.value, signature=b"")
    session.keep_refusal(error)
    name = session.site.name
    said = signed_answer(name, node, reason.value)
    return Refusal(name, reason.value, session.identity.sign(*said))
