"""Transcript of a key epoch as JSON: every message in order, and the sum.

A transcript holds what crossed the wire, so it is as secret as the wire. Replaying it needs no
secret: the server's side is run again over the sites' messages, and every request and the sum
must come out byte for byte. Another implementation can be held against the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cloister_fl.errors import CloisterError, TranscriptMismatch
from cloister_fl.membership.roster import Roster
from cloister_fl.secagg.messages.codec import (
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
    decode,
)
from cloister_fl.secagg.server import Phase, ServerEpoch
from cloister_fl.secagg.unmasking import Aggregate

FORMAT = "cloister/secagg/v2/transcript"

Direction = Literal["to site", "to server"]
TO_SITE: Direction = "to site"
TO_SERVER: Direction = "to server"


@dataclass
class Transcript:
    """Messages as they pass; ``to_json`` when the sum is there.

    Attributes:
        roster: the roster of the epoch.
        notes: whatever else belongs in the file, such as a test vector's seeds.
    """

    roster: Roster
    notes: Mapping[str, Any] = field(default_factory=dict)
    _entries: list[dict[str, str]] = field(default_factory=list)

    def record(self, direction: Direction, site: str, message: Message) -> None:
        """Note one message between the server and a site."""
        self._entries.append(
            {
                "direction": direction,
                "site": site,
                "message": message.NAME,
                "bytes": message.encode().hex(),
            }
        )

    def to_json(self, aggregate: Aggregate) -> str:
        """The transcript and the sum that it leads to."""
        outcome = {
            "survivors": list(aggregate.survivors),
            "scale": aggregate.scale,
            "total": aggregate.total.astype("<u4").tobytes().hex(),
        }
        return json.dumps(
            {
                "format": FORMAT,
                "notes": dict(self.notes),
                "roster": self.roster.encode().hex(),
                "messages": self._entries,
                "outcome": outcome,
            },
            indent=1,
        )


def replay(text: str) -> Aggregate:
    """Run the server over a transcript; the sum, which is the one that the transcript states.

    Raises:
        TranscriptMismatch: it is malformed, a message is refused, a request or the sum differs.
    """
    try:
        aggregate, outcome = _replay(json.loads(text))
        stated = np.frombuffer(bytes.fromhex(outcome["total"]), "<u4")
        survivors, scale = tuple(outcome["survivors"]), outcome["scale"]
    except TranscriptMismatch:
        raise
    except CloisterError as error:
        raise TranscriptMismatch(
            "A message of the transcript is not valid.", why=f"It raises {error.code}."
        ) from None
    except (KeyError, TypeError, ValueError, IndexError):
        raise TranscriptMismatch("The transcript is malformed.") from None
    if (
        not np.array_equal(stated, aggregate.total)
        or survivors != aggregate.survivors
        or scale != aggregate.scale
    ):
        raise TranscriptMismatch("The transcript's messages do not give the sum that it states.")
    return aggregate


def _replay(data: Any) -> tuple[Aggregate, Any]:
    if data["format"] != FORMAT:
        raise TranscriptMismatch("The transcript has another format.")
    roster = Roster.decode(bytes.fromhex(data["roster"]))
    server: ServerEpoch | None = None
    for entry in data["messages"]:
        message = decode(bytes.fromhex(entry["bytes"]))
        _check_label(entry, message)
        if isinstance(message, AdvertiseRequest) and server is None:
            server = ServerEpoch(message.terms, roster)
        if server is None:
            raise TranscriptMismatch("The transcript does not begin with stage 0.")
        if entry["direction"] == TO_SERVER:
            _receive(server, message)
        elif _request(server, message, entry["site"]).encode() != message.encode():
            raise TranscriptMismatch(f"A {message.NAME} request is not what the server sends.")
    if server is None:
        raise TranscriptMismatch("The transcript is empty.")
    return server.finish(), data["outcome"]


def _check_label(entry: Any, message: Message) -> None:
    """Refuse an entry whose direction, site or name is not that of its message."""
    direction: Direction = TO_SITE
    sites: tuple[str, ...] = (entry["site"],)
    match message:
        case Shares():
            direction, sites = TO_SERVER, (message.dealing.dealer,)
        case Advertisement() | Complaint() | Disclosure() | Masked() | Consistent() | Unmasked():
            direction, sites = TO_SERVER, (message.site,)
        case AdvertiseRequest():
            sites = message.terms.invited
        case ShareRequest():
            sites = tuple(record.site for record in message.records)
        case ConsistencyRequest() | UnmaskRequest():
            sites = message.u3
    if (
        entry["direction"] != direction
        or entry["site"] not in sites
        or entry["message"] != message.NAME
    ):
        raise TranscriptMismatch("An entry of the transcript is about another message than it has.")


def _receive(server: ServerEpoch, message: Message) -> None:
    match message:
        case Advertisement():
            server.receive_advertisement(message)
        case Shares():
            server.receive_shares(message)
        case Complaint():
            server.receive_complaint(message)
        case Disclosure():
            server.receive_disclosure(message)
        case Masked():
            server.receive_masked(message)
        case Consistent():
            server.receive_consistent(message)
        case Unmasked():
            server.receive_unmasked(message)
        case _:
            raise TranscriptMismatch(f"A {message.NAME} message does not go to the server.")


def _request(server: ServerEpoch, message: Message, site: str) -> Message:
    match message:
        case AdvertiseRequest():
            return server.advertise_request()
        case ShareRequest():
            return server.share_request()
        case MaskRequest():
            if not server.sid:
                server.start(message.session)
            return server.mask_request(site)
        case DisclosureRequest():
            requests = server.disclosure_requests()
            if site not in requests:
                raise TranscriptMismatch("The transcript asks a dealer nobody complains of.")
            return requests[site]
        case ConsistencyRequest():
            request = server.close_vectors()
            if request is None:
                raise TranscriptMismatch(
                    "The transcript has a consistency request without a dropout."
                )
            return request
        case UnmaskRequest():
            if server.phase is Phase.VECTORS:
                server.close_vectors()
            return server.unmask_request()
        case _:
            raise TranscriptMismatch(f"A {message.NAME} message does not go to a site.")
