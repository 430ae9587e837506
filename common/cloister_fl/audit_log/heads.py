"""Heads of audit logs as the two sides exchange them: by hash, never by number.

A note is what a message says of its sender's log: which log, the hash of its newest entry, and the
hash of the entry that the message before it named. The second lets the receiver see that a log went
on from what was last heard of it, or parted from that. How many entries lie between the two is not
said: it would count what the sender's own people did meanwhile.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from cloister_fl.encoding.canonical_json import HASH

_NAME_LABEL = b"cloister/audit/name/v1\0"
_NOTE = re.compile(r"([0-9a-f]{16}):([0-9a-f]{64})(?::([0-9a-f]{64}))?", re.ASCII)


class Noted(NamedTuple):
    """What a message said of its sender's log.

    Attributes:
        name: which log, see ``name_of``.
        hash: of the log's newest entry then.
        base: of the entry that the message before it named; empty where it says none.
    """

    name: str
    hash: str
    base: str


def name_of(public: bytes) -> str:
    """What tells a log from others in notes: 16 hexadecimal digits of its writer's key's hash."""
    return hashlib.sha256(_NAME_LABEL + public).hexdigest()[:16]


def parse_note(text: str) -> Noted | None:
    """Read what ``AuditLog.note`` wrote; None for anything else."""
    found = _NOTE.fullmatch(text)
    return Noted(found[1], found[2], found[3] or "") if found else None


def told_heads(heads: Iterable[tuple[str, str]]) -> str:
    """Name and hash of entries of several logs, as one text for all who wrote them."""
    return " ".join(sorted({f"{name}:{digest}" for name, digest in heads}))


def heads_told(text: str, name: str) -> tuple[str, ...]:
    """The hashes that ``told_heads`` tells of one log; what is no hash is passed over."""
    parted = (word.partition(":") for word in text.split())
    return tuple(told for log, _, told in parted if log == name and HASH.fullmatch(told))
