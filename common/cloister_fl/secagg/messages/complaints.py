"""A complaint that a dealer's box does not open (stage 2), and the dealer's answer to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cloister_fl.encoding.framing import Reader, frame, names
from cloister_fl.membership.identity import SIGNATURE_BYTES
from cloister_fl.secagg.crypto import hashes, shamir
from cloister_fl.secagg.messages.message_base import (
    HASH,
    SignedMessage,
    per_site,
    read_per_site,
    sites,
)


@dataclass(frozen=True)
class Complaint(SignedMessage):
    """Stage 2, site to server, in place of a vector: boxes that their dealers signed do not open.

    ``dealers`` sealed to this site what cannot be decrypted, or other shares than they signed; each
    box is the one whose hash its dealer signed, so the fault is the dealer's. ``keys`` is T.
    """

    NAME: ClassVar[str] = "complaint"
    LABEL: ClassVar[str] = hashes.COMPLAINT
    kid: bytes
    keys: bytes
    site: str
    dealers: tuple[str, ...]
    signature: bytes = b""

    def _body(self) -> tuple[bytes, ...]:
        return (self.kid, self.keys, self.site.encode(), names(self.dealers))

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """Read the fields."""
        return cls(
            reader.field(HASH),
            reader.field(HASH),
            reader.text(),
            sites(reader),
            reader.field(SIGNATURE_BYTES),
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls.read(reader)

    def fields(self) -> bytes:
        """The fields in one frame, as a request carries them to the dealer."""
        return frame(*self._fields())


@dataclass(frozen=True)
class Disclosure(SignedMessage):
    """Stage 2, site to server: a dealer's answer to complaints, its two shares for each accuser.

    They are worth to the server what the accuser's word is worth: an honest site does not complain
    of an honest dealer, and one that lies could have given the shares away itself.
    """

    NAME: ClassVar[str] = "disclosure"
    LABEL: ClassVar[str] = hashes.DISCLOSURE
    kid: bytes
    site: str
    shares: tuple[tuple[str, bytes], ...]
    signature: bytes = b""

    def _body(self) -> tuple[bytes, ...]:
        return (self.kid, self.site.encode(), per_site(self.shares))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.field(HASH),
            reader.text(),
            read_per_site(reader, 2 * shamir.SHARE_BYTES),
            reader.field(SIGNATURE_BYTES),
        )
