"""Record of a sum: what sites signed for it, from which anybody computes it again.

It holds the signed keys, dealings, masked vectors, consents and revealed shares of one key epoch
whose sum was computed, and nothing of one that failed: ``ServerEpoch.record`` gives it after
``finish`` alone. It is a part of what the server received, so it tells nothing that the proof in
``cloister_fl.secagg`` does not already allow the server: of each site either b or mask_sk, for one
set of survivors. The sum itself is not in it, nor is a secret that was not revealed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame_pieces, u32
from cloister_fl.errors import TranscriptMismatch
from cloister_fl.membership.roster import MAX_SITES, Roster
from cloister_fl.secagg.messages.codec import (
    Advertisement,
    AdvertiseRequest,
    Consistent,
    Masked,
    Message,
    Shares,
    Unmasked,
    decode,
)
from cloister_fl.secagg.server import ServerEpoch
from cloister_fl.secagg.session import EpochTerms, Session
from cloister_fl.secagg.unmasking import Aggregate

LABEL = "cloister/secagg/v2/sum"
_STAGES = (Advertisement, Shares, Masked, Consistent, Unmasked)
_MOST_ITEMS = len(_STAGES) * MAX_SITES

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True)
class SumRecord:
    """One sum.

    Attributes:
        terms: of the key epoch.
        attempt: number of the attempt at the sum.
        model: hash of the model that the sites were sent, as the server states it; 32 bytes. They
            signed it, so another one fails.
        messages: of the sites, in the order of the stages.
    """

    terms: EpochTerms
    attempt: int
    model: bytes
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, epoch: ServerEpoch, session: Session) -> SumRecord:
        """Return the record of a finished epoch that keeps its vectors."""
        return cls(epoch.terms, session.attempt, session.model, epoch.rests_on())

    def encode(self) -> bytes:
        """Canonical bytes; the vectors are copied once."""
        parameters = self.terms.parameters
        request = AdvertiseRequest(self.terms, parameters.t, parameters.m)
        parts = frame_pieces(*(part._pieces() for part in self.messages))
        items: list[Buffer] = [u32(len(self.messages)), *parts]
        pieces = frame_pieces(
            LABEL.encode(), request.encode(), u32(self.attempt), self.model, items
        )
        return b"".join(pieces)

    @classmethod
    def decode(cls, data: Buffer) -> SumRecord:
        """Read canonical bytes.

        Raises:
            TranscriptMismatch: they are not those of a record.
            SecureAggregationError: a message in it is malformed, or a number out of range.
        """
        try:
            reader = Reader(data)
            if reader.text() != LABEL:
                raise FrameError("another label")
            request = decode(reader.view())
            attempt, model = reader.u32(), reader.field(32)
            messages = tuple(decode(item.rest()) for item in reader.items(_MOST_ITEMS))
            reader.end()
        except FrameError as error:
            raise TranscriptMismatch(
                "The record of a sum is malformed.", why=f"Reason: {error}."
            ) from None
        if not isinstance(request, AdvertiseRequest) or not _are_in_order(messages):
            raise TranscriptMismatch("The record of a sum has other messages than a sum.")
        return cls(request.terms, attempt, model, messages)

    def _each(self, kind: type[MessageT]) -> Iterator[MessageT]:
        return (part for part in self.messages if isinstance(part, kind))

    def replay(self, roster: Roster, session: Session, *, threads: int = 1) -> Aggregate:
        """Run the server again over what the sites signed; the sum that it gives.

        Args:
            roster: of the federation, which the record's terms name.
            session: the constants of the sum, as the reader computes them.
            threads: cores for taking masks away.

        Raises:
            SecureAggregationError: a signature, share or secret is not right, the sites agreed to
                another model, to other constants or to other survivors, or too few agreed.
        """
        epoch = ServerEpoch(self.terms, roster, threads=threads)
        for keys in self._each(Advertisement):
            epoch.receive_advertisement(keys)
        epoch.share_request()
        for shares in self._each(Shares):
            epoch.receive_shares(shares)
        epoch.start(session)
        for masked in self._each(Masked):
            epoch.receive_masked(masked)
        epoch.close_vectors()
        for consent in self._each(Consistent):
            epoch.receive_consistent(consent)
        epoch.unmask_request()
        for reply in self._each(Unmasked):
            epoch.receive_unmasked(reply)
        return epoch.finish()


def _are_in_order(messages: tuple[Message, ...]) -> bool:
    stages = [next((i for i, kind in enumerate(_STAGES) if type(m) is kind), -1) for m in messages]
    return -1 not in stages and stages == sorted(stages)
