"""Words that one party writes and another reads: how they are shown, and when two are the same."""

from __future__ import annotations

import unicodedata


def is_plain(text: str) -> bool:
    """Whether a text is one line of characters that are seen, and spaces."""
    return all(one.isprintable() or unicodedata.category(one) == "Zs" for one in text)


def segment_name(text: str) -> str:
    """A segment's name in the one spelling that is compared and hashed."""
    return " ".join(text.split()).casefold()
