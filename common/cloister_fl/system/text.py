"""Text for people: counts with nouns, lists, texts of other parties, cells of a table."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Fillers of Hangul and the empty pattern of Braille: Unicode counts them as letters or signs, and
nothing is seen of them."""

_FORMULA = re.compile(r'(^|[,;|\t\r\n])(?=[\s"]*[=+@\-\uff1d\uff0b\uff20\uff0d])|^(?=[\t\r\n])')
"""Where Excel, LibreOffice and others would begin a formula: at the start of a cell, and behind
what a spreadsheet of another language takes for the end of one. Full-width signs count in some."""


def is_plain(text: str) -> bool:
    """Whether a text is one line of characters that are seen, and spaces."""
    return _BLANK.isdisjoint(text) and all(
        one.isprintable() or unicodedata.category(one) == "Zs" for one in text
    )


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen: spaces, control and format characters, or nothing."""
    return all(one.isspace() or unicodedata.category(one) in {"Cc", "Cf"} for one in text)


def printable(text: str) -> str:
    """A text for a terminal, with what a terminal might obey as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def as_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: with an apostrophe where one would begin."""
    return _FORMULA.sub(r"\1'", text)


MOST_REASON = 500


def is_reason(text: str) -> bool:
    """Whether a person's reason is one line that is not empty, of at most 500 characters."""
    return bool(text.strip()) and text.isprintable() and len(text) <= MOST_REASON


def counted(number: int, one: str, many: str = "") -> str:
    """``1 image``, ``2 images``; ``many`` where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def listed(words: Iterable[str], most: int) -> str:
    """Different words with commas between, and how many there are beyond ``most``."""
    distinct = list(dict.fromkeys(words))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def segment_name(text: str) -> str:
    """A segment's name in the one spelling that is compared and hashed."""
    return " ".join(text.split()).casefold()
