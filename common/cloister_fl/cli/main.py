"""The command `cloister`: finds its groups through entry points and reports errors.

A group is an entry point of ``cloister_fl.commands`` that names a typer application or a function.
Their modules import torch, flwr and opacus inside functions only, so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import click
import typer
import typer.core
import typer.main

from cloister_fl.cli.tilde import expand_tilde
from cloister_fl.errors import CloisterError, InternalError, OutputInTheWay
from cloister_fl.system.installation import own_entry_points
from cloister_fl.system.libraries.imports import FLOWER
from cloister_fl.system.libraries.logs import silence_libraries
from cloister_fl.system.module_path import forget_working_folder
from cloister_fl.version import __version__

GROUP = "cloister_fl.commands"
INTERRUPTED = 130
_SYSTEM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
"""What the system, and no fault of ours, does to a file."""
_ORDER = ("demo", "simulate", "predict", "study", "client", "server", "verify", "explain")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cloister {__version__}")
        raise typer.Exit


def build() -> click.Command:
    """Assemble the root command from what is installed."""
    # Typer escapes square brackets for rich wherever rich is installed, also where it is not used.
    typer.core.HAS_RICH = False
    app = typer.Typer(
        name="cloister",
        help="Federated learning for radiology in which no image leaves its hospital.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
        ] = False,
    ) -> None:
        del version

    for entry in sorted(own_entry_points(GROUP), key=_position):
        _attach(app, entry.name, entry.load())
    command = typer.main.get_command(app)
    expand_tilde(command)
    return command


def _position(entry: EntryPoint) -> tuple[int, str]:
    known = _ORDER.index(entry.name) if entry.name in _ORDER else len(_ORDER)
    return known, entry.name


def _attach(app: typer.Typer, name: str, found: typer.Typer | Callable[..., Any]) -> None:
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with an exit status.

    Intended errors print their message; anything else prints ``CLO-901`` without its text,
    which could quote a patient's data. ``CLOISTER_TRACEBACK=1`` shows it to a developer.
    """
    forget_working_folder()
    # Before anything imports flwr.
    for name, value in FLOWER.items():
        os.environ.setdefault(name, value)
    silence_libraries()
    try:
        status = build()(args=arguments, prog_name="cloister", standalone_mode=False)
    except CloisterError as error:
        _say(str(error), error.code)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        status = INTERRUPTED
    except OSError as error:
        fault = _of_the_system(error)
        _say(str(fault), fault.code)
        sys.exit(fault.exit_status)
    except Exception as error:
        if os.environ.get("CLOISTER_TRACEBACK") == "1":
            traceback.print_exc()
        fault = _internal(error)
        _say(str(fault), fault.code)
        sys.exit(fault.exit_status)
    if status == INTERRUPTED:
        _say("Stopped.", None)
    sys.exit(status or 0)


def _of_the_system(error: OSError) -> CloisterError:
    """The error of a file that the system does not let us use; its path may name a patient."""
    if error.errno not in _SYSTEM:
        if os.environ.get("CLOISTER_TRACEBACK") == "1":
            traceback.print_exc()
        return _internal(error)
    return OutputInTheWay(
        "A file cannot be written or read.",
        why=f"{os.strerror(error.errno)}.",
        remedy="Look at free space, mount options and permissions of the folder that the command "
        "works in, and repeat the command: df -h .; findmnt -T .; ls -ld .",
    )


def _internal(error: Exception) -> InternalError:
    return InternalError(
        f"Internal error ({type(error).__name__}).",
        remedy="Repeat it with CLOISTER_TRACEBACK=1 on data without patients and report it.",
    )


def _say(text: str, code: str | None) -> None:
    print(text, file=sys.stderr)  # noqa: T201
    if code:
        print(f"More: cloister explain {code}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
