"""Reader of hand-written TOML files: all faults at once, each with its line.

``tomllib`` gives no positions, so ``key_lines`` finds them in the text; values always come from
``tomllib``, and a position that cannot be found is reported as line 0 rather than guessed.
"""

from __future__ import annotations

import difflib
import re
import stat
import tomllib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from cloister_fl.errors import Fault, FileUnreadable
from cloister_fl.system.text import is_plain
from cloister_fl.system.toml_positions import KeyPath, _lines, key_lines
from cloister_fl.system.toml_words import in_our_words

MAX_BYTES = 1 << 20
"""Largest file that is read; a hand-written file is a thousand times smaller."""

_AT_LINE = re.compile(r" \(at line (\d+), column (\d+)\)$")

Location = tuple[int | str, ...]
ModelT = TypeVar("ModelT", bound="FileModel")


class FileModel(BaseModel):
    """Base of every table of a hand-written file: unknown keys and wrong types are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ShownModel(FileModel):
    """A table that is judged by people elsewhere than where it was written."""

    @field_validator("*", mode="after")
    @classmethod
    def _shown_as_it_is(cls, value: Any) -> Any:
        # A person decides by what a terminal shows of it: nothing may move the cursor, hide or
        # turn what follows, or begin a line of its own.
        if not all(map(is_plain, _texts(value))):
            raise ValueError("holds a line break or another character that cannot be seen.")
        return value


class VariantModel(ShownModel):
    """A table whose keys depend on one of them."""

    @classmethod
    @abstractmethod
    def model_of(cls, given: object) -> type[ShownModel]:
        """The model that judges a table, for hints about its keys."""


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (*_texts(key), *_texts(each))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _texts(each)


def read_text(path: Path) -> str:
    """Return the text of a file that a person wrote.

    Raises:
        FileUnreadable: it is missing, too large, not a file, or not UTF-8.
    """
    name = path.absolute().name or str(path)  # "." has no name of its own
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            # A pipe would be waited for, a device read for ever.
            raise FileUnreadable(f"{name} is not a file.", remedy="Name the right file.")
        if about.st_size > MAX_BYTES:
            raise FileUnreadable(f"{name} is larger than 1 MiB.", remedy="Name the right file.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise FileUnreadable(f"{name} is not UTF-8 text.", remedy="Save it as UTF-8.") from None
    except OSError as error:
        why = (error.strerror or "the system gave no reason") + "."
        raise FileUnreadable(
            f"{name} cannot be read.", why=why, remedy="Check the path and its permissions."
        ) from None


def parse(text: str, model: type[ModelT]) -> tuple[ModelT | None, tuple[Fault, ...]]:
    """Judge ``text`` against ``model``: the parsed model, or all faults at once."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return None, (_syntax_fault(str(error), text),)
    except (ValueError, RecursionError):
        # A number of thousands of digits, or brackets thousands deep: tomllib lets both escape.
        return None, (
            Fault(0, "TOML", "Has a value that is too long or too deeply nested to read."),
        )
    return judge(data, model, key_lines(text))


def judge(
    data: dict[str, Any], model: type[ModelT], lines: Mapping[KeyPath, int] | None = None
) -> tuple[ModelT | None, tuple[Fault, ...]]:
    """Judge tables that were read or put together: the model, or all faults at once.

    Args:
        data: the tables; faulty keys are taken out of it.
        model: what they should be.
        lines: the line of each key in the file; none where there is no file.
    """
    lines = lines or {}
    faults: set[Fault] = set()
    taken: set[Location] = set()
    while True:
        try:
            valid = model.model_validate(data)
        except ValidationError as error:
            # What was taken out is missing now, which is no fault of the file.
            details = [detail for detail in _told(error) if not {*_places(detail)} & taken]
            faults |= {one for each in details for one in _faults(each, data, model, lines)}
            # A table with a faulty key is never asked how its keys fit together, so the faulty
            # ones are taken out and the rest is judged again.
            out = {_take_out(data, detail["loc"]) for detail in details} - {()}
            if not out:
                return None, tuple(sorted(faults))
            taken |= out
        else:
            return (None if faults else valid), tuple(sorted(faults))


def _told(error: ValidationError) -> list[ErrorDetails]:
    """Return the errors of a validation, without those that only follow from others."""
    details = error.errors(include_url=False)
    places = [detail["loc"] for detail in details]

    def follows(detail: ErrorDetails) -> bool:
        # pydantic counts a list as short by the items that it refused.
        here = detail["loc"]
        return detail["type"] == "too_short" and any(
            len(place) > len(here) and place[: len(here)] == here for place in places
        )

    return [detail for detail in details if not follows(detail)]


def _places(detail: ErrorDetails) -> tuple[Location, Location]:
    """Where an error was found, and the key that it is about: a rule on a table names one."""
    named = getattr(detail.get("ctx", {}).get("error"), "key", "")
    return detail["loc"], (*detail["loc"], *named.split(".")) if named else detail["loc"]


def _take_out(data: dict[str, Any], location: Location) -> Location:
    """Delete what an error points at, or the value that holds it; return what was deleted."""
    here: Any = data
    for depth, part in enumerate(location):
        if not isinstance(here, dict) or part not in here:
            return ()
        if depth == len(location) - 1 or not isinstance(here[part], dict):
            del here[part]
            return location[: depth + 1]
        here = here[part]
    return ()


def _syntax_fault(message: str, text: str) -> Fault:
    match = _AT_LINE.search(message)
    if match:
        return Fault(int(match.group(1)), "TOML", message[: match.start()] + ".")
    message = message.removesuffix(" (at end of document)")
    return Fault(len(_lines(text.rstrip())), "TOML", message + ".")


def _faults(
    detail: ErrorDetails,
    data: Mapping[str, Any],
    model: type[BaseModel],
    lines: Mapping[KeyPath, int],
) -> Iterator[Fault]:
    kind, location = detail["type"], detail["loc"]
    given = location if kind == "missing" else _written(location, data)
    path = tuple(str(part) for part in given)
    key = ".".join(path) or "file"
    line = _line([part for part in given if isinstance(part, str)], lines)
    if kind == "extra_forbidden":
        yield Fault(line, key, "is not a known key.", _nearest(path, model, data))
    elif kind == "missing":
        yield Fault(line, key, "is missing.")
    elif kind == "value_error":
        error = detail.get("ctx", {}).get("error")
        for each in error.errors if isinstance(error, KeyedValueErrors) else (error,):
            located = getattr(each, "key", "")
            full = (*path, *located.split(".")) if located else path
            hint = getattr(each, "hint", "")
            yield Fault(_line(full, lines), ".".join(full) or "file", str(each), hint)
    elif len(given) < len(location) and location[-1] != "[key]":
        # One error for each type that the key could have had.
        yield Fault(line, key, "has a value of a type that is not accepted.")
    else:
        yield Fault(line, key, in_our_words(detail), _given(detail["input"]))


def _written(location: Location, data: Mapping[str, Any]) -> Location:
    """Cut off what pydantic adds to a location: the type it tried, or ``[key]``."""
    here: Any = data
    for depth, part in enumerate(location):
        within = isinstance(here, dict) and part in here
        if not within and not (isinstance(here, list) and isinstance(part, int)):
            return location[:depth]
        here = here[part]
    return location


class KeyedValueError(ValueError):
    """A fault that a validator of several keys pins on one of them."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.hint = hint


class KeyedValueErrors(ValueError):
    """Several such faults, found together."""

    def __init__(self, errors: Sequence[KeyedValueError]) -> None:
        super().__init__(" ".join(map(str, errors)))
        self.errors = tuple(errors)


def _given(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return ""  # Python refuses to print an integer of thousands of digits
    if isinstance(value, bool | int | float | str) and len(repr(value)) <= 60:
        return f"It says {value!r}."
    return ""


def _line(path: Sequence[str], lines: Mapping[KeyPath, int]) -> int:
    for end in range(len(path), 0, -1):
        if tuple(path[:end]) in lines:
            return lines[tuple(path[:end])]
    return 0


def _nearest(path: KeyPath, model: type[BaseModel], data: Mapping[str, Any]) -> str:
    """Name the valid key that is most like the last part of ``path``."""
    here: Any = model
    given: Any = data
    for part in path[:-1]:
        fields = getattr(here, "model_fields", {})
        here = fields[part].annotation if part in fields else None
        given = given.get(part) if isinstance(given, Mapping) else None
        if isinstance(here, type) and issubclass(here, VariantModel):
            here = here.model_of(given)
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        return ""
    names = list(here.model_fields)
    close = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known keys here: {', '.join(names)}."
