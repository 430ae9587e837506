"""What `--help` of each command says."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from cloister_fl.cli.main import build


def commands(group: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command below a group, groups included."""
    yield words
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*words, name))


ROOT = build()
ALL = tuple(commands(ROOT))


def test_there_are_commands() -> None:
    assert len(ALL) > 40
    assert ("client", "budget", "close") in ALL


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_argument_is_explained(words: tuple[str, ...]) -> None:
    """A library that loses the texts of arguments would leave a bare ``STUDY  [required]``."""
    found = CliRunner().invoke(ROOT, [*words, "--help"], terminal_width=200)
    assert found.exit_code == 0
    command = ROOT
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            told = getattr(parameter, "help", None)
            assert told, parameter.name
            assert " ".join(told.split()) in " ".join(found.output.split())
