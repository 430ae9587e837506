"""Replies of a site to the server: whose they are, of which epoch, and what each answers."""

from __future__ import annotations

from cloister_fl.errors import SessionMismatch
from cloister_fl.secagg import remedies
from cloister_fl.secagg.messages.codec import (
    Abort,
    Advertisement,
    AdvertiseRequest,
    Complaint,
    ConsistencyRequest,
    Consistent,
    Disclosure,
    DisclosureRequest,
    Masked,
    MaskRequest,
    Message,
    ShareRequest,
    Shares,
    Unmasked,
    UnmaskRequest,
)
from cloister_fl.secagg.server import ServerEpoch

_ANSWERS: dict[type[Message], tuple[type[Message], ...]] = {
    AdvertiseRequest: (Advertisement,),
    ShareRequest: (Shares,),
    MaskRequest: (Masked, Complaint),
    DisclosureRequest: (Disclosure,),
    ConsistencyRequest: (Consistent,),
    UnmaskRequest: (Unmasked,),
}


def require_answers(site: str, requests: tuple[Message, ...], parts: tuple[Message, ...]) -> None:
    """Require one answer for each request, in their order; an abort answers any.

    A site that leaves one out has refused, and is to be named as one that did.

    Raises:
        SessionMismatch: something is missing, or was not requested.
    """
    fits = len(parts) == len(requests) and all(
        isinstance(part, (*_ANSWERS[type(request)], Abort))
        for request, part in zip(requests, parts, strict=True)
    )
    if not fits:
        raise SessionMismatch(
            f"{site} sent other messages than it was asked for.", remedy=remedies.REPEAT
        )


def belongs(part: Message, epoch: ServerEpoch) -> bool:
    """Whether a reply names this epoch, or its sum."""
    match part:
        case Advertisement() | Shares() | Complaint() | Disclosure() | Abort():
            return part.kid == epoch.terms.kid
        case Masked() | Consistent() | Unmasked():
            return bool(epoch.sid) and part.sid == epoch.sid
    return False


def author(part: Message) -> str:
    """The site that a reply is from, as it says; empty for what is no reply."""
    match part:
        case Shares():
            return part.dealing.dealer
        case (
            Advertisement()
            | Complaint()
            | Disclosure()
            | Abort()
            | Masked()
            | Consistent()
            | Unmasked()
        ):
            return part.site
    return ""


def receive(part: Message, epoch: ServerEpoch) -> None:
    """Hand a reply to the epoch that it belongs to.

    Raises:
        SecureAggregationError: the epoch refuses it.
    """
    match part:
        case Advertisement():
            epoch.receive_advertisement(part)
        case Shares():
            epoch.receive_shares(part)
        case Complaint():
            epoch.receive_complaint(part)
        case Disclosure():
            epoch.receive_disclosure(part)
        case Masked():
            epoch.receive_masked(part)
        case Consistent():
            epoch.receive_consistent(part)
        case Unmasked():
            epoch.receive_unmasked(part)
        case Abort():
            epoch.receive_abort(part)
