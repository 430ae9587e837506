"""Why rows of a labels file name no image: keys that differ by what a program or a person changed.

Spreadsheets drop leading zeros and write long numbers in their own way; people add spaces and
hyphens. Messages count such pairs and name lines, never a key.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from cloister_fl.system.text import counted, listed

_SHOWN = 5
_SEPARATORS = re.compile(r"[\s_./\\-]+")
_ZEROS = re.compile(r"^(\D*)0+(?=\d)")
_FRACTION = re.compile(r"\.0+$")


class Row(Protocol):
    """A row of the file."""

    @property
    def line(self) -> int: ...


def _without_separators(key: str) -> str:
    return _SEPARATORS.sub("", key)


def _without_zeros(key: str) -> str:
    return _ZEROS.sub(r"\1", key)


def _without_fraction(key: str) -> str:
    return _FRACTION.sub("", key)


def _in_one_width(key: str) -> str:
    return unicodedata.normalize("NFKC", key)


_DIFFERENCES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("leading zeros", _without_zeros),
    ("capitals and small letters", str.casefold),
    ("a trailing .0, as spreadsheets add it,", _without_fraction),
    ("spaces, hyphens, dots or slashes", _without_separators),
    ("the form of characters", _in_one_width),
)
"""What may differ, the plainest first, and a key without it."""


def mismatches(
    unused: Mapping[tuple[str, str], Row], wanted: Iterable[tuple[str, str]]
) -> list[str]:
    """Say in what rows that belong to no image differ from the keys of images without a row.

    Args:
        unused: the rows, by key column and key.
        wanted: column and key of the images that have no row.

    Returns:
        A sentence for each difference that makes at least one row fit.
    """
    rest = dict(unused)
    keys: dict[str, set[str]] = {}
    for column, key in wanted:
        keys.setdefault(column, set()).add(key)
    told = []
    for what, loosened in _DIFFERENCES:
        found = {
            (column, key)
            for column, theirs in keys.items()
            for key in _matching(column, rest, {loosened(one) for one in theirs}, loosened)
        }
        if found:
            at = listed([str(rest[one].line) for one in rest if one in found], _SHOWN)
            columns = " or ".join(sorted({column for column, _ in found}))
            told.append(
                f"{counted(len(found), 'row', 'rows')} would fit but for {what} in {columns} "
                f"(line {at})."
            )
            rest = {one: row for one, row in rest.items() if one not in found}
    return told


def _matching(
    column: str,
    rows: Collection[tuple[str, str]],
    theirs: set[str],
    loosened: Callable[[str], str],
) -> list[str]:
    return [key for name, key in rows if name == column and loosened(key) in theirs]
