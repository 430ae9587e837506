"""A file that a person wrote, with all its faults in one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloister_fl.errors.families import InputError


@dataclass(frozen=True, order=True)
class Fault:
    """One fault in a file that a person wrote.

    Attributes:
        line: 1-based line in the file, or 0 where no line can be named.
        key: dotted path of the key, such as ``training.rounds``.
        message: what is wrong with it.
        hint: what to write instead; may be empty.
    """

    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{where}{self.key}: {self.message}{hint}"


class _FaultyFile(InputError):
    """A file with faults, all of them in one message."""

    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, name: str, faults: Sequence[Fault]) -> _FaultyFile:
        ordered = tuple(sorted(faults))
        count = "1 fault" if len(ordered) == 1 else f"{len(ordered)} faults"
        listing = "\n".join(f"  {fault}" for fault in ordered)
        error = cls(f"{name} has {count}:\n{listing}")
        error.faults = ordered
        return error
