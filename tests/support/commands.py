"""Run a command in the tests' own process, as its command line would."""

from __future__ import annotations

import typer
from click.testing import Result
from typer.testing import CliRunner


def invoke(app: typer.Typer, *words: object, said: str = "") -> Result:
    """The command's end, with what it printed.

    Args:
        app: the group that the words are told to.
        words: made to text one by one.
        said: what is typed at its questions.

    Raises:
        BaseException: what the command itself raised, but for an exit with a status.
    """
    result = CliRunner().invoke(app, [str(word) for word in words], input=said)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
