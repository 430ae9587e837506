"""The protocol's messages, and the only way from bytes to them and back.

A message is a frame: the protocol's version, the message's name, its fields. Decoding refuses
another version, an unknown name, a missing, trailing or over-long byte and ids out of order, so
the bytes of a message are canonical: ``decode(data).encode() == data``.

Requests go from the server to a site and carry no signature, for a site believes nothing that
it cannot recompute. Replies are signed by the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame_pieces
from cloister_fl.errors import WireInvalid
from cloister_fl.secagg import remedies
from cloister_fl.secagg.messages.complaints import Complaint, Disclosure
from cloister_fl.secagg.messages.message_base import Message
from cloister_fl.secagg.messages.participant_messages import (
    Abort,
    Advertisement,
    Consistent,
    Dealing,
    DealtRow,
    DealtTo,
    Masked,
    Shares,
    Unmasked,
    consent_body,
)
from cloister_fl.secagg.messages.server_messages import (
    AdvertiseRequest,
    ConsistencyRequest,
    DisclosureRequest,
    MaskRequest,
    Parcel,
    ShareRequest,
    UnmaskRequest,
)
from cloister_fl.secagg.parameters import VERSION

__all__ = [
    "Abort",
    "AdvertiseRequest",
    "Advertisement",
    "Bundle",
    "Complaint",
    "ConsistencyRequest",
    "Consistent",
    "Dealing",
    "DealtRow",
    "DealtTo",
    "Disclosure",
    "DisclosureRequest",
    "MaskRequest",
    "Masked",
    "Message",
    "Parcel",
    "ShareRequest",
    "Shares",
    "UnmaskRequest",
    "Unmasked",
    "consent_body",
    "decode",
]

BUNDLE_PARTS = 4
"""Most messages in one bundle; two are needed."""


@dataclass(frozen=True)
class Bundle(Message):
    """Several messages in one trip: a stage of this epoch and a stage of the next.

    Attributes:
        parts: 1 to ``BUNDLE_PARTS`` messages, none of them a bundle.
    """

    NAME: ClassVar[str] = "bundle"
    parts: tuple[Message, ...]

    def _fields(self) -> tuple[list[Buffer]]:
        parts = frame_pieces(*(part._pieces() for part in self.parts))
        return ([len(self.parts).to_bytes(4, "big"), *parts],)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(tuple(_decode(item, within=cls) for item in reader.items(BUNDLE_PARTS)))


_KINDS: dict[str, type[Message]] = {
    kind.NAME: kind
    for kind in (
        AdvertiseRequest,
        Advertisement,
        ShareRequest,
        Shares,
        MaskRequest,
        Masked,
        Complaint,
        DisclosureRequest,
        Disclosure,
        ConsistencyRequest,
        Consistent,
        UnmaskRequest,
        Unmasked,
        Abort,
        Bundle,
    )
}


def decode(data: Buffer) -> Message:
    """Read one message.

    Raises:
        WireInvalid: the bytes are not the canonical bytes of a message.
        ParameterRefused, WeightAboveCap: a number in it is outside what the protocol allows.
    """
    try:
        return _decode(Reader(data))
    except FrameError as error:
        raise WireInvalid(
            "A message is malformed.",
            why=f"Reason: {error}.",
            remedy=remedies.SAME_VERSION,
        ) from None


def _decode(reader: Reader, within: type[Message] | None = None) -> Message:
    if reader.text() != VERSION:
        raise FrameError("the protocol's version is another")
    kind = _KINDS.get(reader.text())
    # Refused before it is read: nested bundles could otherwise exhaust the stack.
    if kind is None or kind is within:
        raise FrameError("the message's name is unknown")
    message = kind._read(reader)
    reader.end()
    return message
