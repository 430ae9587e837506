"""The home folder in paths of the command line.

A shell replaces the tilde of ``--dir ~/site``, and leaves that of ``--dir=~/site`` to the program.
"""

from __future__ import annotations

import os
from typing import Any

import click


def expanded(text: str) -> str:
    """Return a path with the home folder in the place of ``~`` or ``~USER``, as a shell would."""
    return os.path.expanduser(text)  # noqa: PTH111 - a Path would change the text otherwise


def expand_tilde(command: click.Command) -> None:
    """Have a command, and all commands in it, replace the tilde in every path that they take."""
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type = _PathOfHome(parameter.type)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            expand_tilde(each)


class _PathOfHome(click.Path):
    """A type of paths as it was, but for the tilde."""

    def __init__(self, as_it_was: click.Path) -> None:
        super().__init__()
        vars(self).update(vars(as_it_was))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        given = expanded(value) if isinstance(value, str) else value
        return super().convert(given, param, ctx)
