"""The coordinator's commands that let sites in, each for many sites at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from cloister_fl.cli.confirm import DECLINED
from cloister_fl.client.network import join
from cloister_fl.errors import OptionInvalid, SiteStateInvalid
from cloister_fl.membership.enrolment import Invite, Request
from cloister_fl.membership.identity import fingerprint
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator.federation import AUDIT
from cloister_fl.server.coordinator.folder import (
    SERVER_FILE,
    Coordinator,
    Layout,
    init_coordinator,
    open_coordinator,
)
from cloister_fl.server.rounds.site_ledgers import known_ledgers
from support import commands
from support.errors import raises

NAMES = ("anker", "birke", "clara")


def command(*arguments: str | Path, said: str = "") -> Result:
    return commands.invoke(server_group.app, *arguments, said=said)


@pytest.fixture
def place(tmp_path: Path) -> Coordinator:
    """A coordinator whom three sites have asked; its server is not running."""
    made = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",)))
    command("invite", *NAMES, "--dir", made.root)
    for name in NAMES:
        invite = Invite.decode((made.root / "invites" / f"{name}.invite").read_text())
        site = join.prepare(tmp_path / name, invite)
        keys = [(site.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
        with made.registry() as registry:
            registry.use(Request.make(invite, site.identity(), *keys))
    return made


def states(place: Coordinator) -> dict[str, str]:
    with place.registry() as registry:
        return {row.name: row.state for row in registry.sites()}


def on_roster(place: Coordinator) -> set[str]:
    return {entry.site for entry in place.federation().roster().entries}


def test_a_path_that_join_would_not_use_is_told(tmp_path: Path, place: Coordinator) -> None:
    name = NAMES[0]
    invite = Invite.decode((place.root / "invites" / f"{name}.invite").read_text())
    site = join.prepare(tmp_path / "new", invite, dicom=tmp_path / "wrong")
    for key in ("dicom", "labels"):
        with raises(OptionInvalid, match=f"its {key} is another one"):
            join.prepare(tmp_path / "new", invite, **{key: tmp_path / "right"})
    again = join.prepare(tmp_path / "new", invite, dicom=tmp_path / "wrong")
    assert again.dicom == site.dicom == tmp_path / "wrong"


def test_init_invites_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    invites = [word for name in NAMES for word in ("--invite", name)]
    output = command("init", folder, "--address", "127.0.0.1:9443", *invites).output
    with open_coordinator(folder).registry() as registry:
        assert [name for name, _ in registry.invited()] == list(NAMES)
    for name in NAMES:
        path = folder / "invites" / f"{name}.invite"
        assert Invite.decode(path.read_text()).site == name
        assert path.stat().st_mode & 0o777 == 0o600
        assert str(path) in output
    assert "cloister-invite" not in output  # a secret goes to a file, not to the screen


def test_init_makes_nothing_where_a_site_cannot_be_named_so(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    with raises(OptionInvalid, match="'North!'"):
        command("init", folder, "--address", "h:9443", "--invite", "anker", "--invite", "North!")
    assert not folder.exists()


@pytest.fixture
def empty(tmp_path: Path) -> Coordinator:
    """A coordinator who has invited nobody."""
    return init_coordinator(tmp_path / "empty", Layout(("127.0.0.1:9443",)))


def open_invites(place: Coordinator) -> list[str]:
    with place.registry() as registry:
        return [name for name, _ in registry.invited()]


@pytest.mark.parametrize(
    ("names", "error", "told"),
    [
        (("first", "bad name", "last"), OptionInvalid, "'bad name'"),
        (("first", "anker"), SiteStateInvalid, "anker is pending already"),
        (("first", ""), OptionInvalid, "''"),
    ],
    ids=["no site's name", "one that asked", "empty"],
)
def test_where_one_site_cannot_be_invited_none_is(
    place: Coordinator, names: tuple[str, ...], error: Any, told: str
) -> None:
    log = (place.keys / AUDIT).read_bytes()
    with raises(error, match=told):
        command("invite", *names, "--dir", place.root)
    assert open_invites(place) == []
    assert not (place.root / "invites" / "first.invite").exists()
    assert (place.keys / AUDIT).read_bytes() == log


def test_a_new_invite_says_that_it_replaces_one(empty: Coordinator) -> None:
    path = empty.root / "invites" / "anker.invite"
    first = command("invite", "anker", "birke", "--dir", empty.root)
    assert "no longer works" not in first.output
    before = path.read_text()
    again = command("invite", "anker", "clara", "--dir", empty.root)
    assert again.stderr == "The earlier invite of anker no longer works.\n"
    assert path.read_text() != before
    assert open_invites(empty) == ["anker", "birke", "clara"]
    # Printed for another program: the invite alone, and no file with the one that ended.
    printed = command("invite", "anker", "--print", "--dir", empty.root)
    (line,) = printed.stdout.splitlines()
    assert Invite.decode(line).site == "anker"
    assert printed.stderr == "The earlier invite of anker no longer works.\n"
    assert not path.exists()


def test_a_site_that_is_named_twice_gets_one_invite(empty: Coordinator) -> None:
    told = command("invite", "anker", "anker", "--dir", empty.root)
    assert told.stdout.count("The invite of anker is in ") == 1
    assert told.stderr == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--name", "other"), "--name is"),
        (("--listen", "127.0.0.1"), "--listen is"),
        (("--enrolment-port", "9500"), "--enrolment-port is"),
        (("--name", "federation", "--private-port", "9600"), "--name and --private-port are"),
        (("--address", "h:1"), "--address is"),
    ],
)
def test_init_of_a_folder_that_is_there_ignores_no_option(
    empty: Coordinator, given: tuple[str, ...], told: str
) -> None:
    written = (empty.root / SERVER_FILE).read_bytes()
    with raises(OptionInvalid, match=f"exists already, so {told} not used") as caught:
        command("init", empty.root, *given)
    assert f"Edit that file, then run: cloister server init {empty.root}" in caught.value.remedy
    assert (empty.root / SERVER_FILE).read_bytes() == written
    assert "is complete" in command("init", empty.root).output


@pytest.mark.usefixtures("at_a_terminal")
def test_approve_asks_for_each_site_that_waits(place: Coordinator) -> None:
    result = command("approve", "--dir", place.root, said="y\nn\ny\n")
    with place.registry() as registry:
        for row in registry.sites():
            assert f"{row.name}'s key has the fingerprint\n  {fingerprint(row.identity)}" in (
                result.output
            )
    assert states(place) == {"anker": "approved", "birke": "pending", "clara": "approved"}
    assert on_roster(place) == {"anker", "clara"}
    assert result.exit_code == SiteStateInvalid.exit_status
    assert f"cloister server revoke birke --dir {place.root}" in result.output
    # Those who are in are not asked about again.
    again = command("approve", "--dir", place.root, said="y\n")
    assert again.exit_code == 0
    assert "anker's key" not in again.output
    with raises(SiteStateInvalid, match="No site waits"):
        command("approve", "--dir", place.root)


@pytest.mark.usefixtures("at_a_terminal")
def test_approve_takes_several_names_and_all_of_them_must_be_known(place: Coordinator) -> None:
    with raises(SiteStateInvalid, match="dorn has not asked"):
        command("approve", "anker", "dorn", "--dir", place.root, said="y\ny\n")
    assert set(states(place).values()) == {"pending"}
    assert command("approve", "anker", "birke", "--dir", place.root, said="y\ny\n").exit_code == 0
    assert states(place) == {"anker": "approved", "birke": "approved", "clara": "pending"}
    command("revoke", "birke", "--yes", "--dir", place.root)
    with raises(SiteStateInvalid, match="birke was revoked"):
        command("approve", "clara", "birke", "--dir", place.root, said="y\ny\n")
    assert states(place)["clara"] == "pending"


@pytest.mark.usefixtures("at_a_terminal")
def test_the_end_of_the_input_approves_nobody(place: Coordinator) -> None:
    """Ctrl-D at the second question: who was compared is in, and the others are said to be not."""
    result = command("approve", "--dir", place.root, said="y\n")
    assert states(place) == {"anker": "approved", "birke": "pending", "clara": "pending"}
    assert result.exit_code == SiteStateInvalid.exit_status
    for name in ("birke", "clara"):
        assert f"\n{name} is not approved. " in result.output


def test_nobody_is_approved_unseen(place: Coordinator) -> None:
    with raises(OptionInvalid, match="Not a terminal: the fingerprint was not compared"):
        command("approve", "--dir", place.root, said="y\ny\ny\n")
    with place.registry() as registry:
        mark = fingerprint(registry.sites()[0].identity)
    for names in ((), ("anker", "birke")):
        with raises(OptionInvalid, match="exactly one site"):
            command("approve", *names, "--fingerprint", mark, "--dir", place.root)
    with raises(SiteStateInvalid, match="does not have this fingerprint"):
        command("approve", "birke", "--fingerprint", mark, "--dir", place.root)
    assert set(states(place).values()) == {"pending"}
    assert on_roster(place) == set()


@pytest.mark.usefixtures("at_a_terminal")
def test_revoke_names_the_federation_and_asks(place: Coordinator) -> None:
    result = command("revoke", "birke", "--dir", place.root, said="n\n")
    assert result.exit_code == DECLINED != 0
    assert f"Federation federation, in {place.root.resolve()}\n" in result.output
    assert "The site birke (pending) is revoked permanently." in result.output
    assert states(place)["birke"] == "pending"
    assert command("revoke", "birke", "--dir", place.root, said="y\n").exit_code == 0
    assert states(place)["birke"] == "revoked"
    log = (place.keys / AUDIT).read_bytes()
    again = command("revoke", "birke", "--dir", place.root)
    assert (again.exit_code, again.output) == (0, "birke was revoked already.\n")
    assert (place.keys / AUDIT).read_bytes() == log


def test_an_invite_alone_is_revoked_and_the_name_is_free(empty: Coordinator) -> None:
    command("invite", "anker", "--dir", empty.root)
    told = command("revoke", "anker", "--yes", "--dir", empty.root).output
    assert told.endswith("\nThe invite of anker no longer works.\n")
    assert open_invites(empty) == []
    again = command("invite", "anker", "--dir", empty.root)
    assert (again.stderr, open_invites(empty)) == ("", ["anker"])


def test_revoke_without_a_terminal_tells_the_command_to_paste(place: Coordinator) -> None:
    with raises(OptionInvalid, match="Not a terminal: ") as error:
        command("revoke", "birke", "--dir", place.root, said="y\n")
    assert states(place)["birke"] == "pending"
    words = shlex.split(error.value.remedy.partition("run: ")[2])
    where = ["--dir", str(place.root.resolve()), "--yes"]
    assert words == ["cloister", "server", "revoke", "birke", *where]
    assert command(*words[2:]).exit_code == 0
    assert states(place)["birke"] == "revoked"
    with raises(SiteStateInvalid):
        command("revoke", "nobody", "--dir", place.root)


@pytest.mark.usefixtures("at_a_terminal")
def test_another_ledger_of_a_site_is_accepted_by_a_person_and_logged(place: Coordinator) -> None:
    words = ("accept-ledger", "birke", "--dir", place.root)
    with raises(SiteStateInvalid, match="was not refused for its privacy ledger"):
        command(*words)
    for kind, ledger in (("ledger", "1" * 64), ("ledger-changed", "2" * 64)):
        place.federation().note(kind, site="birke", ledger=ledger)
    refused = command(*words, said="n\n")
    assert refused.exit_code == DECLINED
    assert "with the privacy ledger 2222222222222222" in refused.output
    assert known_ledgers(place.federation().log.entries())["birke"].accepted == "1" * 64
    assert command(*words, said="y\n").exit_code == 0
    assert known_ledgers(place.federation().log.entries())["birke"].accepted == "2" * 64
    assert "ledger-accepted" in command("audit", "--dir", place.root).output
    with raises(SiteStateInvalid):
        command(*words)
