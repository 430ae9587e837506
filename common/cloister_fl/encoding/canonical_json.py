"""Canonical JSON: the one form in which a value is hashed, signed and chained.

Keys sorted, no white space, ASCII with ``\\u`` escapes, no NaN and no infinity. Equal values have
equal bytes, so the form must never change: hashes that sites approved stand on it.
"""

from __future__ import annotations

import json
from typing import Any


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
