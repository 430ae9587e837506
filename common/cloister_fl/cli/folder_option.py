"""Option ``--dir`` of `cloister client` and `cloister server`, at any place of the command line.

``client --dir X budget close ID``, ``client budget --dir X close ID`` and ``client budget close ID
--dir X`` mean the same. Click gives each group and command its own options and drops what a group
was given, so that a command would act on the folder that it was started in instead.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import typer
import typer.core

from cloister_fl.cli.tilde import expanded
from cloister_fl.errors import OptionInvalid

Function = TypeVar("Function", bound=Callable[..., Any])

OPTION = "--dir"
_GIVEN = "cloister.dir"
"""Key of ``click.Context.meta``, which a command shares with the groups it is called through."""


def folder_option(text: str) -> Any:
    """Declare ``--dir`` of a command or group of a ``FolderTyper``; ``text`` is its help."""
    return typer.Option(OPTION, help=text, show_default="here")


SiteFolder = Annotated[Path, folder_option("The site folder.")]
CoordinatorFolder = Annotated[Path, folder_option("The coordinator's folder.")]


class FolderCommand(typer.core.TyperCommand):
    """A command that heeds a ``--dir`` given to one of its groups."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command's own part of the line.

        Raises:
            OptionInvalid: the line names two folders, or an empty one.
        """
        return super().parse_args(ctx, _with_folder(self, ctx, args))


class FolderGroup(typer.core.TyperGroup):
    """A group whose ``--dir`` holds for the commands in it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the group's own part of the line.

        Raises:
            OptionInvalid: the line names two folders, or an empty one.
        """
        return super().parse_args(ctx, _with_folder(self, ctx, args))


def _ordered(order: Sequence[str]) -> type[FolderGroup]:
    """A group that lists its commands so; Typer would list all commands before the groups."""

    class Ordered(FolderGroup):
        def list_commands(self, ctx: click.Context) -> list[str]:
            place = {name: number for number, name in enumerate(order)}
            return sorted(super().list_commands(ctx), key=lambda name: place.get(name, len(place)))

    return Ordered


class FolderTyper(typer.Typer):
    """An application whose groups and commands all take ``--dir``; see ``folder_option``.

    Args:
        order: names of its commands and groups, as its help lists them; others come last.
        settings: as of ``typer.Typer``.
    """

    def __init__(self, *, order: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**{"cls": _ordered(order), **settings})

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a command, as in ``typer.Typer``."""
        return super().command(name, **{"cls": FolderCommand, **settings})


def one_folder(positional: Path | None, option: Path | None) -> Path | None:
    """The folder of a command that takes it as an argument and as ``--dir``; None where neither.

    Raises:
        OptionInvalid: they differ.
    """
    if positional is not None and option is not None:
        _require_same(str(option), str(positional))
    return option if positional is None else positional


def dir_option(folder: Path) -> str:
    """Return `` --dir FOLDER``, quoted, for a command in a message.

    Empty for the folder that this command was started in.
    """
    return "" if folder == Path() else f" {OPTION} {shlex.quote(str(folder))}"


def _with_folder(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """The arguments, with the ``--dir`` of a group before them where they hold none."""
    own = _values(command, ctx, args)
    known: list[str] = ctx.meta.setdefault(_GIVEN, [])
    for value in map(expanded, own):
        if not value:
            raise OptionInvalid(
                f"{OPTION} is empty.",
                why="A shell variable may be unset.",
                remedy=f"Name the folder, or leave {OPTION} out to use the current folder.",
            )
        if known:
            _require_same(known[0], value)
        known.append(value)
    # A path would read it as the current folder.
    if "" in args and any(one.name == "positional" for one in command.params):
        raise OptionInvalid(
            "DIR is empty.",
            why="A shell variable may be unset.",
            remedy="Name the folder; '.' is the current one.",
        )
    return [f"{OPTION}={known[0]}", *args] if known and not own else args


def _values(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """Each value of ``--dir`` among the arguments; click itself keeps the last one alone."""
    every = click.Option([OPTION, "every"], multiple=True)
    twin = copy.copy(command)
    twin.params = [every if OPTION in one.opts else one for one in command.params]
    options, _, _ = twin.make_parser(ctx).parse_args(args=list(args))
    found = options.get("every")
    return [str(value) for value in found] if isinstance(found, list) else []


def _require_same(one: str, other: str) -> None:
    if Path(one).resolve() != Path(other).resolve():
        raise OptionInvalid(
            f"Two folders are named: {shlex.quote(one)} and {shlex.quote(other)}.",
            why="A command acts on one folder.",
            remedy="Leave one of them out.",
        )
