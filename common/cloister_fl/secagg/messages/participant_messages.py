"""Messages from a site to the server: each is signed by the site, over the epoch or session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame, listed, names, u32
from cloister_fl.membership.identity import SIGNATURE_BYTES, Identity, verify
from cloister_fl.membership.roster import MAX_SITES
from cloister_fl.secagg.crypto import hashes, shamir
from cloister_fl.secagg.messages.message_base import (
    HASH,
    Message,
    SignedMessage,
    per_site,
    read_per_site,
    rising,
    sites,
)

BOX_BYTES = 2 * shamir.SHARE_BYTES + 16
"""A sealed box: the shares of b and of mask_sk, and the tag."""
MOST_SIBLINGS = 10
"""Hashes on the path of a row: of at most 1000 rows."""


@dataclass(frozen=True)
class Advertisement(SignedMessage):
    """Stage 0, site to server: the signed record of its fresh keys."""

    NAME: ClassVar[str] = "advertise"
    LABEL: ClassVar[str] = hashes.ADVERTISE
    kid: bytes
    site: str
    enc_pk: bytes
    mask_pk: bytes
    commitment: bytes
    signature: bytes = b""

    def _body(self) -> tuple[bytes, ...]:
        return (self.kid, self.site.encode(), self.enc_pk, self.mask_pk, self.commitment)

    @property
    def record(self) -> bytes:
        """The complete signed record, as ``T`` hashes it."""
        return frame(*self._fields())

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """Read what ``record`` gave."""
        return cls(
            reader.field(HASH),
            reader.text(),
            reader.field(HASH),
            reader.field(HASH),
            reader.field(HASH),
            reader.field(SIGNATURE_BYTES),
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls.read(reader)


@dataclass(frozen=True)
class DealtTo:
    """What a dealer signs for one holder: hashes of the box and of both shares."""

    holder: str
    box_hash: bytes
    b_hash: bytes
    mask_key_hash: bytes

    @cached_property
    def _encoded(self) -> bytes:
        return frame(self.holder.encode(), self.box_hash, self.b_hash, self.mask_key_hash)

    def encode(self) -> bytes:
        return self._encoded

    @classmethod
    def read(cls, reader: Reader) -> Self:
        dealt = cls(reader.text(), reader.field(HASH), reader.field(HASH), reader.field(HASH))
        reader.end()
        return dealt


@dataclass(frozen=True)
class Dealing:
    """A dealer's signed list of what it dealt to every site of U1, itself included."""

    dealer: str
    dealt: tuple[DealtTo, ...]
    signature: bytes = b""

    @cached_property
    def _tree(self) -> hashes.Levels:
        return hashes.levels([item.encode() for item in self.dealt] or [b""])

    @cached_property
    def _paths(self) -> tuple[bytes, ...]:
        return hashes.paths(self._tree)

    def _body(self, keys: bytes) -> tuple[bytes, ...]:
        return _dealing_body(keys, self.dealer, len(self.dealt), self._tree[-1][0])

    def signed_by(self, identity: Identity, keys: bytes) -> Dealing:
        """The same list signed over ``T``."""
        return Dealing(self.dealer, self.dealt, identity.sign(hashes.SHARE, *self._body(keys)))

    def verified(self, public: bytes, keys: bytes) -> bool:
        """True where the signature is that of ``public`` over this ``T``."""
        return verify(public, self.signature, hashes.SHARE, *self._body(keys))

    @cached_property
    def _by_holder(self) -> dict[str, int]:
        return {item.holder: index for index, item in enumerate(self.dealt)}

    def to(self, holder: str) -> DealtTo | None:
        """The entry of one holder."""
        index = self._by_holder.get(holder)
        return None if index is None else self.dealt[index]

    def row(self, holder: str) -> DealtRow:
        """The entry of one holder with what proves that the dealer signed it.

        Raises:
            KeyError: there is none.
        """
        index = self._by_holder[holder]
        dealt, path = self.dealt[index], self._paths[index]
        return DealtRow(self.dealer, dealt, index, len(self.dealt), path, self.signature)

    def encode(self) -> bytes:
        """Canonical bytes, without the message's head."""
        dealt = listed(item.encode() for item in self.dealt)
        return frame(self.dealer.encode(), dealt, self.signature)

    @classmethod
    def read(cls, reader: Reader) -> Self:
        dealing = cls(
            reader.text(),
            tuple(DealtTo.read(item) for item in reader.items(MAX_SITES)),
            reader.field(SIGNATURE_BYTES),
        )
        rising(tuple(item.holder for item in dealing.dealt))
        reader.end()
        return dealing


def _dealing_body(keys: bytes, dealer: str, count: int, root: bytes) -> tuple[bytes, ...]:
    """What a dealer signs: T, and the root of the tree over what it dealt to each site of U1."""
    return (keys, dealer.encode(), u32(count), root)


@dataclass(frozen=True)
class DealtRow:
    """One holder's entry of a dealing, which its path and the dealing's signature prove.

    A holder needs no other's entry, so a request to it grows with the number of dealers and not
    with its square. That the dealing covers U1 is checked by the server, whom it concerns.

    Attributes:
        dealer: who dealt.
        dealt: the entry.
        index: the entry's place among ``count``, from 0.
        count: entries of the dealing.
        path: hashes that lead to the root; see ``hashes.paths``.
        signature: the dealing's.
    """

    dealer: str
    dealt: DealtTo
    index: int
    count: int
    path: bytes
    signature: bytes

    def verified(self, public: bytes, keys: bytes) -> bool:
        """True where the owner of ``public`` signed a dealing over this ``T`` with this entry."""
        root = hashes.root_from(self.dealt.encode(), self.index, self.count, self.path)
        if root is None:
            return False
        body = _dealing_body(keys, self.dealer, self.count, root)
        return verify(public, self.signature, hashes.SHARE, *body)

    def encode(self) -> bytes:
        """Canonical bytes, without the message's head."""
        return frame(
            self.dealer.encode(),
            self.dealt.encode(),
            u32(self.index),
            u32(self.count),
            self.path,
            self.signature,
        )

    @classmethod
    def read(cls, reader: Reader) -> Self:
        row = cls(
            reader.text(),
            DealtTo.read(Reader(reader.view())),
            reader.u32(),
            reader.u32(),
            reader.field(),
            reader.field(SIGNATURE_BYTES),
        )
        if len(row.path) % HASH or len(row.path) > MOST_SIBLINGS * HASH:
            raise FrameError("a path has another length than agreed")
        reader.end()
        return row


@dataclass(frozen=True)
class Shares(Message):
    """Stage 1, site to server: the signed dealing, and a sealed box for each peer of U1."""

    NAME: ClassVar[str] = "share"
    kid: bytes
    dealing: Dealing
    boxes: tuple[tuple[str, bytes], ...]

    @cached_property
    def _by_holder(self) -> dict[str, bytes]:
        return dict(self.boxes)

    def box_for(self, holder: str) -> bytes:
        """The box of one holder; empty where there is none."""
        return self._by_holder.get(holder, b"")

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.kid, self.dealing.encode(), per_site(self.boxes))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        kid = reader.field(HASH)
        dealing = Dealing.read(Reader(reader.view()))
        return cls(kid, dealing, read_per_site(reader, BOX_BYTES))


@dataclass(frozen=True)
class Masked(Message):
    """Stage 2, site to server: y, and at once the consistency signature for U3 = U2.

    ``vector`` is y as little-endian uint32, 4 D bytes. ``consent`` is empty where the site has
    answered this round for another U3 before.
    """

    NAME: ClassVar[str] = "mask"
    sid: bytes
    site: str
    u2_hash: bytes
    vector: Buffer
    signature: bytes
    consent: bytes

    @staticmethod
    def body(sid: bytes, site: str, u2_hash: bytes, vector_hash: bytes) -> tuple[bytes, ...]:
        """What the site signs for y."""
        return (sid, site.encode(), u2_hash, vector_hash)

    def verified(self, public: bytes) -> bool:
        """True where the signature is that of ``public``; hashes the vector."""
        hashed = hashes.vector_hash(self.vector)
        body = self.body(self.sid, self.site, self.u2_hash, hashed)
        return verify(public, self.signature, hashes.MASKED, *body)

    def _fields(self) -> tuple[Buffer, ...]:
        return (
            self.sid,
            self.site.encode(),
            self.u2_hash,
            self.vector,
            self.signature,
            self.consent,
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        masked = cls(
            reader.field(HASH),
            reader.text(),
            reader.field(HASH),
            reader.view(),
            reader.field(SIGNATURE_BYTES),
            reader.field(),
        )
        if len(masked.consent) not in (0, SIGNATURE_BYTES):
            raise FrameError("a signature has another length")
        return masked


def consent_body(
    sid: bytes, site: str, u2: tuple[str, ...], u3: tuple[str, ...]
) -> tuple[bytes, ...]:
    """What ``site`` signs to consent to the sum over U3."""
    return (sid, site.encode(), names(u2), names(u3))


@dataclass(frozen=True)
class Consistent(Message):
    """Stage 3, site to server: the site's signature over (sid, U2, U3)."""

    NAME: ClassVar[str] = "consistent"
    sid: bytes
    site: str
    u3: tuple[str, ...]
    signature: bytes

    def _fields(self) -> tuple[Buffer, ...]:
        return (self.sid, self.site.encode(), names(self.u3), self.signature)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.field(HASH), reader.text(), sites(reader), reader.field(SIGNATURE_BYTES))


@dataclass(frozen=True)
class Unmasked(SignedMessage):
    """Stage 4, site to server: its shares of b for U3, of mask_sk for U2 minus U3."""

    NAME: ClassVar[str] = "unmask"
    LABEL: ClassVar[str] = hashes.UNMASK
    sid: bytes
    site: str
    u3: tuple[str, ...]
    b_shares: tuple[tuple[str, bytes], ...]
    mask_key_shares: tuple[tuple[str, bytes], ...]
    signature: bytes = b""

    def _body(self) -> tuple[bytes, ...]:
        return (
            self.sid,
            self.site.encode(),
            names(self.u3),
            per_site(self.b_shares),
            per_site(self.mask_key_shares),
        )

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.field(HASH),
            reader.text(),
            sites(reader),
            read_per_site(reader, shamir.SHARE_BYTES),
            read_per_site(reader, shamir.SHARE_BYTES),
            reader.field(SIGNATURE_BYTES),
        )


@dataclass(frozen=True)
class Abort(SignedMessage):
    """Any stage, site to server: a code from the closed list, and no word more.

    ``kid`` names the epoch that the site has given up. It blames nobody: an accusation counts only
    with its proof, as a ``Complaint``.
    """

    NAME: ClassVar[str] = "abort"
    LABEL: ClassVar[str] = hashes.ABORT
    kid: bytes
    site: str
    code: str
    signature: bytes = b""

    def _body(self) -> tuple[bytes, ...]:
        return (self.kid, self.site.encode(), self.code.encode())

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.field(HASH),
            reader.text(),
            reader.text(),
            reader.field(SIGNATURE_BYTES),
        )
