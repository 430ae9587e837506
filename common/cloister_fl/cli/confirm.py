"""Confirmation of commands whose effect cannot be undone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.cli.folder_option import OPTION
from cloister_fl.errors import OptionInvalid

DECLINED = 1
"""Exit status where the answer is no."""

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation; for scripts.")]


def confirm(effect: str, *, owner: str, folder: Path, command: Sequence[str], yes: bool) -> None:
    """Show what a command acts on and its effect, and ask for confirmation; the default is no.

    Args:
        effect: what the command does, a sentence.
        owner: whose folder it is, such as ``site north``.
        folder: the folder that it acts on; its absolute path is shown.
        command: the command with its arguments, without ``--dir`` and ``--yes``.
        yes: whether ``--yes`` was given; nothing is asked then.

    Raises:
        OptionInvalid: ``--yes`` was not given, and standard input is not a terminal.
        typer.Exit: the answer was no.
    """
    place = folder.resolve()
    if not yes and not sys.stdin.isatty():
        paste = shlex.join([*command, OPTION, str(place), "--yes"])
        raise OptionInvalid(
            f"Not a terminal: this was not confirmed for {owner} in {place}.",
            why=effect,
            remedy=f"To confirm it, run: {paste}",
        )
    typer.echo(f"{owner[:1].upper()}{owner[1:]}, in {place}")
    typer.echo(f"  {effect}")
    if not yes and not typer.confirm("Continue?", default=False):
        typer.echo("Nothing was changed.")
        raise typer.Exit(DECLINED)
