"""Base of all messages: their head on the wire, and lists of sites."""

from __future__ import annotations

from typing import ClassVar, Self

from cloister_fl.encoding.framing import Buffer, FrameError, Reader, frame, is_sorted_set
from cloister_fl.membership.roster import MAX_SITES
from cloister_fl.secagg.parameters import VERSION

HASH = 32
"""Bytes of a hash or of an X25519 key."""


class Message:
    """Base of all messages; each has a name of its own on the wire."""

    NAME: ClassVar[str]

    def _fields(self) -> tuple[Buffer, ...]:
        raise NotImplementedError

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        raise NotImplementedError

    def encode(self) -> bytes:
        """Canonical bytes."""
        return frame(VERSION.encode(), self.NAME.encode(), *self._fields())


def rising(ids: tuple[str, ...]) -> tuple[str, ...]:
    """The ids, which must rise strictly: one form for one set."""
    if not is_sorted_set(ids):
        raise FrameError("ids do not rise")
    return ids


def sites(reader: Reader) -> tuple[str, ...]:
    """A set of site ids."""
    return rising(reader.names(MAX_SITES))


def named(reader: Reader, size: int) -> tuple[str, bytes]:
    """A site id and that many bytes."""
    pair = (reader.text(), reader.field(size))
    reader.end()
    return pair
