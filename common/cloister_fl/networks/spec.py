"""Entries of the registry of networks: how a network is built, and which arguments it takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from cloister_fl.errors import ExtraMissing, InstallError
from cloister_fl.system.installation import install_command

if TYPE_CHECKING:
    from torch import nn

Value: TypeAlias = int | str
Answers: TypeAlias = Literal["image", "pixel"]
"""Whether a network answers for each image or for each pixel."""
Builder: TypeAlias = Callable[[int, int, Mapping[str, Any], Path | None], "nn.Module"]


class NetworkChoice(Protocol):
    """What a study says of its network: the registry asks no more of a study.

    Attributes:
        name: a name of the registry.
        arguments: values by the names of the entry's arguments; defaults fill what is missing.
    """

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> dict[str, int | float | str | bool]: ...


@dataclass(frozen=True)
class Choice:
    """A network by name and arguments, where there is no study that chooses one.

    Attributes:
        name: a name of ``REGISTRY``.
        arguments: values by the names of the entry's arguments; defaults fill what is missing.
    """

    name: str
    arguments: dict[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Argument:
    """A whole-number argument of a network.

    Attributes:
        default: value where the study names none.
        low, high: smallest and largest value.
        multiple: the value must be a multiple of this.
        divides: the value must divide this; 0 for no such rule.
    """

    default: int
    low: int
    high: int
    multiple: int = 1
    divides: int = 0

    @property
    def range(self) -> str:
        step = f", in steps of {self.multiple}" if self.multiple > 1 else ""
        divisor = f", a divisor of {self.divides}" if self.divides else ""
        return f"a whole number from {self.low} to {self.high}{step}{divisor}"

    def accepts(self, value: object) -> bool:
        # bool is an int to Python, not to a reader.
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        if not self.low <= value <= self.high or value % self.multiple:
            return False
        return not self.divides or self.divides % value == 0


@dataclass(frozen=True)
class Word:
    """An argument of a network that is text.

    Attributes:
        choices: the values to choose from; empty for a SHA-256 in 64 hexadecimal digits.
        default: value where the study names none; None where it must.
    """

    choices: tuple[str, ...] = ()
    default: str | None = None

    @property
    def range(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return "a SHA-256 in 64 hexadecimal digits, lower case"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        return value in self.choices if self.choices else bool(re.fullmatch("[0-9a-f]{64}", value))


@dataclass(frozen=True)
class Entry:
    """A network of the registry.

    Attributes:
        name: what a study writes.
        smallest: smallest side of the input, in pixels.
        arguments: arguments by name.
        builder: makes it from (outputs, input channels, arguments, folder of models).
        dimensions: 2 where it reads images, 3 where it reads volumes.
        answers: whether it gives logits for each image, or one for each pixel.
        fewest_outputs: how many logits it gives at least.
    """

    name: str
    smallest: int
    builder: Builder = field(repr=False)
    arguments: Mapping[str, Argument | Word] = field(default_factory=dict)
    dimensions: int = 2
    answers: Answers = "image"
    fewest_outputs: int = 1

    def misfits(self, arguments: Mapping[str, object], size: int) -> Iterator[Misfit]:
        """What keeps the network from being built so: all of it, not only the first.

        Args:
            arguments: what a study gives, by name.
            size: side of the square input, in pixels.
        """
        for name, value in arguments.items():
            known = self.arguments.get(name)
            if known is None:
                told = f"The network '{self.name}' has no argument '{name}'."
                yield Misfit(f"arguments.{name}", told, nearest(name, self.arguments))
            elif not known.accepts(value):
                told = f"The argument '{name}' of '{self.name}' cannot be {value!r}."
                yield Misfit(f"arguments.{name}", told, f"It is {known.range}.")
        for name, one in self.arguments.items():
            if one.default is None and name not in arguments:
                told = f"The network '{self.name}' needs the argument '{name}'."
                yield Misfit(f"arguments.{name}", told, f"It is {one.range}.")
        if size < self.smallest:
            yield Misfit(
                "name",
                f"Images of {size} pixels are too small for '{self.name}'.",
                f"Set input.size to {self.smallest} or more, or choose another network.",
            )


@dataclass(frozen=True)
class Misfit:
    """Why a network cannot be built as a study asks.

    Attributes:
        key: the key of the study's table ``network`` that it is about.
        what, remedy: sentences for the person who writes the study.
    """

    key: str
    what: str
    remedy: str


def nearest(name: str, known: Mapping[str, object]) -> str:
    """Name the known word that is most like ``name``; else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(known)}." if known else "It takes no arguments."


def missing_package(package: str) -> InstallError:
    return ExtraMissing(
        f"The package '{package}' is not installed.",
        remedy=f"Run: {install_command('client')}",
    )
