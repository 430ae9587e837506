"""Hash chains: each entry's hash covers the entry before it.

The audit log writes the previous hash into the entry; the ledger keeps it beside. Both are SHA-256
under a label, so no hash of one can stand for a hash of the other. Neither form may change.
"""

from __future__ import annotations

import hashlib
import re

GENESIS = "0" * 64
"""What stands for the hash before the first entry."""

HASH = re.compile(r"[0-9a-f]{64}")
"""A hash of a chain, as text."""


def entry_hash(label: bytes, text: str, *, beside: str | None = None) -> str:
    """The hash of an entry: 64 hexadecimal digits.

    Args:
        label: says of which chain.
        text: the entry in canonical JSON.
        beside: the previous entry's hash, where ``text`` does not hold it.
    """
    before = b"" if beside is None else beside.encode() + b"\0"
    return hashlib.sha256(label + before + text.encode()).hexdigest()
