"""The list of commands in the help of each group: its order, and sentences that are not cut."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from cloister_fl.cli import main

GROUPS = ["", "study", "client", "client quarantine", "client budget", "server"]
ORDER = {
    "client": "init join check start stop status renew fetch quarantine patients data-report "
    "freeze review approve deny roster budget certificate audit find privacy-audit proxy "
    "address",
    "server": "init start stop status renew invite sites approve revoke accept-ledger run resume "
    "report audit",
}


def listed(group: str) -> list[str]:
    """The lines of a group's commands, in a terminal of 80 columns."""
    done = CliRunner().invoke(main.build(), [*group.split(), "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    return done.output.partition("Commands:\n")[2].splitlines()


def test_these_are_all_groups() -> None:
    def below(command: click.Command, path: str) -> list[str]:
        if not isinstance(command, click.Group):
            return []
        return [
            path,
            *(
                one
                for name, each in command.commands.items()
                for one in below(each, f"{path} {name}".strip())
            ),
        ]

    assert sorted(below(main.build(), "")) == sorted(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_no_summary_is_cut(group: str) -> None:
    lines = listed(group)
    assert len(lines) > 2
    assert [line for line in lines if line.endswith("...") or len(line) > 80] == []


@pytest.mark.parametrize("group", ORDER)
def test_commands_stand_in_the_order_of_their_use(group: str) -> None:
    assert [line.split()[0] for line in listed(group)] == ORDER[group].split()
