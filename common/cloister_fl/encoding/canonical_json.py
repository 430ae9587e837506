"""Canonical JSON: the one form in which a value is hashed, signed and chained; and the chains.

Keys sorted, no white space, ASCII with ``\\u`` escapes, no NaN and no infinity. Equal values have
equal bytes, so the form must never change: hashes that sites approved stand on it.

In a hash chain each entry's hash covers the entry before it. The audit log writes the previous hash
into the entry; the ledger keeps it beside. Both are SHA-256 under a label, so no hash of one can
stand for a hash of the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

GENESIS = "0" * 64
"""What stands for the hash before the first entry."""

HASH = re.compile(r"[0-9a-f]{64}")
"""A hash of a chain, as text."""


def canonical_json(value: object) -> str:
    """The canonical form of a value of JSON's types; ASCII.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is of no type of JSON's.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_canonical(text: str | bytes) -> dict[str, Any] | None:
    """Read an object that stands in its canonical form; None for anything else."""
    form = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        value = json.loads(text)
        if isinstance(value, dict) and canonical_json(value).encode() == form:
            return value
    except (ValueError, RecursionError):
        pass
    return None


def entry_hash(label: bytes, text: str, *, beside: str | None = None) -> str:
    """The hash of an entry: 64 hexadecimal digits.

    Args:
        label: says of which chain.
        text: the entry in canonical JSON.
        beside: the previous entry's hash, where ``text`` does not hold it.
    """
    before = b"" if beside is None else beside.encode() + b"\0"
    return hashlib.sha256(label + before + text.encode()).hexdigest()
