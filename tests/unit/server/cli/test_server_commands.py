"""The coordinator's commands that let sites in, each for many sites at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import Result

from cloister_fl.cli.confirm import DECLINED
from cloister_fl.client.network import join
from cloister_fl.errors import OptionInvalid, SiteStateInvalid
from cloister_fl.membership.enrolment import Invite, Request
from cloister_fl.membership.identity import fingerprint
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator.folder import (
    Coordinator,
    Layout,
    init_coordinator,
    open_coordinator,
)
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
