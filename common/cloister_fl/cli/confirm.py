"""Questions to the person at the terminal; the end of the input (Ctrl-D) is no answer, so a no."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import click
import typer

from cloister_fl.cli.folder_option import OPTION
from cloister_fl.errors import OptionInvalid

DECLINED = 1
"""Exit status where the answer is no."""
UNCHANGED = "Nothing was changed."

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
    if not yes and not ask("Continue?"):
        typer.echo(UNCHANGED)
        raise typer.Exit(DECLINED)


def ask(question: str) -> bool:
    """Ask a question at the terminal; the default is no.

    Raises:
        click.Abort: the person interrupted it (Ctrl-C).
    """
    try:
        return typer.confirm(question, default=False)
    except click.Abort as ended:
        _raise_interrupt(ended)
        typer.echo()  # the prompt's line is still open
        return False


def ask_hidden(question: str, *, err: bool = False) -> str:
    """Ask for a text that is not shown, before the command has changed anything.

    Args:
        question: what is asked for.
        err: whether it is written to standard error.

    Raises:
        click.Abort: the person interrupted it (Ctrl-C).
        typer.Exit: the person ended the input.
    """
    try:
        return str(typer.prompt(question, hide_input=True, err=err))
    except click.Abort as ended:
        _raise_interrupt(ended)
        typer.echo(UNCHANGED, err=err)
        raise typer.Exit(DECLINED) from None


def _raise_interrupt(ended: click.Abort) -> None:
    """Click raises one exception for both ends of a prompt, and keeps in it which one it was."""
    if isinstance(ended.__context__, KeyboardInterrupt):
        raise ended
