"""Arguments of the functions that programs call, judged before anything is written or started.

Who calls a public function from Python is told which argument is wrong and what it may be, by a
numbered error; a traceback from inside would say neither.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from cloister_fl.errors import InputError, OptionInvalid

StrPath: TypeAlias = str | os.PathLike[str]
WordT = TypeVar("WordT", bound=str)
T = TypeVar("T")

MAX_SEED = 2**63 - 1
_LONGEST = 60


def refused(name: str, value: object, remedy: str) -> InputError:
    """Return the error of an argument that cannot be used.

    Args:
        name: of the argument.
        value: what was given; shown where it is short.
        remedy: what may be given, a sentence.
    """
    return OptionInvalid(f"The argument '{name}' cannot be {shown(value)}.", remedy=remedy)


def shown(value: object) -> str:
    """A value as it is told of: itself where it is short and plain, else its type."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of that size"  # Python refuses to print one of thousands of digits
    plain = value is None or isinstance(value, bool | int | float | str | bytes)
    if plain and len(repr(value)) <= _LONGEST:
        return repr(value)
    return f"of type {type(value).__name__}" if not plain else "as long as it is"


def path(name: str, value: Any) -> Path:
    """A path, given as text or as an object that is one.

    Raises:
        OptionInvalid: it is neither, or holds what no path can hold.
    """
    try:
        given = os.fspath(value)
        usable = isinstance(given, str) and bool(given) and b"\0" not in os.fsencode(given)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise refused(name, value, "Give a path, as text or as pathlib.Path.")
    return Path(given)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``; those of numpy, too.

    Raises:
        OptionInvalid: it is another or none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise refused(name, value, f"Give a whole number from {low} to {high}.")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        OptionInvalid: it is neither.
    """
    if not isinstance(value, bool):
        raise refused(name, value, "Give True or False.")
    return value


def word(name: str, value: Any, words: Iterable[WordT]) -> WordT:
    """One of some words.

    Raises:
        OptionInvalid: it is none of them.
    """
    known = tuple(words)
    for one in known:
        if isinstance(value, str) and value == one:
            return one
    raise refused(name, value, f"Choose one of: {', '.join(map(repr, known))}.")


def text(name: str, value: Any) -> str:
    """Text.

    Raises:
        OptionInvalid: it is none.
    """
    if not isinstance(value, str):
        raise refused(name, value, "Give text.")
    return value


def of_type(name: str, value: Any, kind: type[T], remedy: str) -> T:
    """A value of a type.

    Raises:
        OptionInvalid: it is of another.
    """
    if not isinstance(value, kind):
        raise refused(name, value, remedy)
    return value
