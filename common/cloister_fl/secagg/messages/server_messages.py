"""Messages from the server to a site: unsigned, for a site believes what it can recompute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cloister_fl.encoding.framing import (
    Buffer,
    FrameError,
    Reader,
    f64,
    frame,
    listed,
    names,
    u32,
    u64,
)
from cloister_fl.membership.identity import SIGNATURE_BYTES
from cloister_fl.membership.roster import MAX_SITES
from cloister_fl.secagg.crypto import shamir
from cloister_fl.secagg.messages.complaints import Complaint
from cloister_fl.secagg.messages.message_base import (
    HASH,
    Message,
    per_site,
    read_per_site,
    rising,
    sites,
)
from cloister_fl.secagg.messages.participant_messages import BOX_BYTES, Advertisement, DealtRow
from cloister_fl.secagg.session import EpochTerms, Session


@dataclass(frozen=True)
class AdvertiseRequest(Message):
    """Stage 0, server to site: make the keys of this epoch."""

    NAME: ClassVar[str] = "advertise?"
    terms: EpochTerms
    threshold: int
    """t as the server has it; a site refuses any but its own."""
    survivors: int
    """m, likewise."""

    def _fields(self) -> tuple[Buffer, ...]:
        terms = self.terms
        return (
            terms.federation.encode(),
            terms.study,
            terms.roster,
            terms.run.encode(),
            u64(terms.epoch),
            names(terms.invited),
            u32(terms.colluders),
            u32(self.threshold),
            u32(self.survivors),
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        terms = EpochTerms(
            reader.text(),
            reader.field(HASH),
            reader.field(HASH),
            reader.text(),
            reader.u64(),
            sites(reader),
            reader.u32(),
        )
        return cls(terms, reader.u32(), reader.u32())


@dataclass(frozen=True)
class ShareRequest(Message):
    """Stage 1, server to site: the records of U1, by rising site id."""

    NAME: ClassVar[str] = "share?"
    kid: bytes
    records: tuple[Advertisement, ...]

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.kid, listed(record.record for record in self.records))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        kid = reader.field(HASH)
        records = tuple(_advertisement(item) for item in reader.items(MAX_SITES))
        rising(tuple(record.site for record in records))
        return cls(kid, records)


@dataclass(frozen=True)
class Parcel:
    """What a dealer dealt to the receiving site.

    Attributes:
        row: what the dealer signed.
        box: the sealed shares; empty in the site's own.
        disclosed: both shares, once the dealer has published them on this site's complaint.
    """

    row: DealtRow
    box: bytes
    disclosed: bytes = b""

    def encode(self) -> bytes:
        return frame(self.row.encode(), self.box, self.disclosed)

    @classmethod
    def read(cls, reader: Reader) -> Self:
        parcel = cls(DealtRow.read(Reader(reader.view())), reader.field(), reader.field())
        if len(parcel.box) not in (0, BOX_BYTES) or len(parcel.disclosed) not in (
            0,
            2 * shamir.SHARE_BYTES,
        ):
            raise FrameError("a box has another length than agreed")
        reader.end()
        return parcel


@dataclass(frozen=True)
class MaskRequest(Message):
    """Stage 2, server to site: the session, and the parcels of U2 by rising dealer."""

    NAME: ClassVar[str] = "mask?"
    kid: bytes
    session: Session
    parcels: tuple[Parcel, ...]

    @property
    def u2(self) -> tuple[str, ...]:
        """The sites whose boxes are here."""
        return tuple(parcel.row.dealer for parcel in self.parcels)

    def _fields(self) -> tuple[Buffer, ...]:
        session = self.session
        return (
            self.kid,
            u64(session.round),
            u32(session.attempt),
            session.model,
            u64(session.dimension),
            f64(session.clip),
            session.weight_list,
            listed(parcel.encode() for parcel in self.parcels),
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        kid = reader.field(HASH)
        session = Session(
            reader.u64(),
            reader.u32(),
            reader.field(HASH),
            reader.u64(),
            reader.f64(),
            tuple(_weight(item) for item in reader.items(MAX_SITES)),
        )
        request = cls(kid, session, tuple(Parcel.read(item) for item in reader.items(MAX_SITES)))
        rising(request.u2)
        return request


@dataclass(frozen=True)
class DisclosureRequest(Message):
    """Stage 2, server to site: publish what you dealt to those who complain, by rising site."""

    NAME: ClassVar[str] = "disclosure?"
    kid: bytes
    complaints: tuple[Complaint, ...]

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.kid, listed(complaint.fields() for complaint in self.complaints))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        kid = reader.field(HASH)
        complaints = tuple(_complaint(item) for item in reader.items(MAX_SITES))
        rising(tuple(complaint.site for complaint in complaints))
        return cls(kid, complaints)


@dataclass(frozen=True)
class ConsistencyRequest(Message):
    """Stage 3, server to site, after a dropout only: sign these survivors."""

    NAME: ClassVar[str] = "consistent?"
    sid: bytes
    u3: tuple[str, ...]

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.sid, names(self.u3))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.field(HASH), sites(reader))


@dataclass(frozen=True)
class UnmaskRequest(Message):
    """Stage 4, server to site: U3 and its members' consistency signatures, by rising site."""

    NAME: ClassVar[str] = "unmask?"
    sid: bytes
    u3: tuple[str, ...]
    signatures: tuple[tuple[str, bytes], ...]

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.sid, names(self.u3), per_site(self.signatures))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.field(HASH), sites(reader), read_per_site(reader, SIGNATURE_BYTES))


def _weight(reader: Reader) -> tuple[str, float]:
    pair = (reader.text(), reader.f64())
    reader.end()
    return pair


def _complaint(reader: Reader) -> Complaint:
    complaint = Complaint.read(reader)
    reader.end()
    return complaint


def _advertisement(reader: Reader) -> Advertisement:
    record = Advertisement.read(reader)
    reader.end()
    return record
