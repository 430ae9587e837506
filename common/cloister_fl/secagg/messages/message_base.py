"""Bases of all messages: their head on the wire, their signature, and lists of sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Self

from cloister_fl.encoding.framing import (
    Buffer,
    FrameError,
    Reader,
    frame,
    frame_pieces,
    is_sorted_set,
    listed,
)
from cloister_fl.membership.identity import Identity, verify
from cloister_fl.membership.roster import MAX_SITES
from cloister_fl.secagg.parameters import VERSION

HASH = 32
"""Bytes of a hash or of an X25519 key."""


class Message:
    """Base of all messages; each has a name of its own on the wire."""

    NAME: ClassVar[str]

    def _fields(self) -> tuple[Buffer | list[Buffer], ...]:
        raise NotImplementedError

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        raise NotImplementedError

    def _pieces(self) -> list[Buffer]:
        """Canonical bytes in pieces, none of which is copied."""
        return frame_pieces(VERSION.encode(), self.NAME.encode(), *self._fields())

    def encode(self) -> bytes:
        """Canonical bytes."""
        return b"".join(self._pieces())


class SignedMessage(Message):
    """A message that its site signs over all other fields; a dataclass whose last field is that.

    Attributes:
        LABEL: what the site signs it as, so that no signature means two things.
    """

    LABEL: ClassVar[str]
    signature: bytes

    def _body(self) -> tuple[bytes, ...]:
        """The fields that are signed, in the order of the wire."""
        raise NotImplementedError

    def signed_by(self, identity: Identity) -> Self:
        """The same message with the site's signature."""
        signature = identity.sign(self.LABEL, *self._body())
        return replace(self, signature=signature)  # type: ignore[type-var]

    def verified(self, public: bytes) -> bool:
        """True where the signature is that of ``public``."""
        return verify(public, self.signature, self.LABEL, *self._body())

    def _fields(self) -> tuple[Buffer, ...]:
        return (*self._body(), self.signature)


def rising(ids: tuple[str, ...]) -> tuple[str, ...]:
    """The ids, which must rise strictly: one form for one set."""
    if not is_sorted_set(ids):
        raise FrameError("ids do not rise")
    return ids


def sites(reader: Reader) -> tuple[str, ...]:
    """A set of site ids."""
    return rising(reader.names(MAX_SITES))


def per_site(pairs: Iterable[tuple[str, bytes]]) -> bytes:
    """A field that has bytes for each of several sites, by rising site id."""
    return listed(frame(site.encode(), data) for site, data in pairs)


def read_per_site(reader: Reader, size: int) -> tuple[tuple[str, bytes], ...]:
    """Read what ``per_site`` gave, with ``size`` bytes for each site."""
    pairs = tuple(_pair(item, size) for item in reader.items(MAX_SITES))
    rising(tuple(site for site, _ in pairs))
    return pairs


def _pair(reader: Reader, size: int) -> tuple[str, bytes]:
    pair = (reader.text(), reader.field(size))
    reader.end()
    return pair
