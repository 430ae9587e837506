"""The trusted roster: what a steward accepted, and nothing that came later by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.client.site.trusted_roster import accept, examine, read_pin
from cloister_fl.errors import RosterInvalid, RosterMismatch
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, sign_roster

ROOT = Identity.generate()
KEYS = {name: Identity.generate().public for name in ("anker", "birke", "clara", "sybil")}


def _roster(serial: int, *names: str, federation: str = "north") -> Roster:
    return Roster.of(federation, serial, [RosterEntry(name, KEYS[name]) for name in names])


def _accept(path: Path, roster: Roster, root: Identity = ROOT) -> Roster:
    return accept(path, sign_roster(roster, root), root.public, confirmed=roster.digest)


def test_what_was_accepted_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "roster.pin"
    roster = _roster(1, "anker", "birke")
    assert _accept(path, roster) == roster
    assert read_pin(path) == roster
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_pinned_before_a_steward_accepts(tmp_path: Path) -> None:
    with pytest.raises(RosterMismatch, match="No roster is trusted"):
        read_pin(tmp_path / "roster.pin")


def test_another_digest_than_the_confirmed_one_is_not_pinned(tmp_path: Path) -> None:
    path = tmp_path / "roster.pin"
    offered, confirmed = _roster(1, "anker", "birke", "sybil"), _roster(1, "anker", "birke")
    with pytest.raises(RosterMismatch, match="confirmed digest"):
        accept(path, sign_roster(offered, ROOT), ROOT.public, confirmed=confirmed.digest)
    assert not path.exists()


def test_a_change_is_shown_before_it_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "roster.pin"
    first, second = _roster(1, "anker", "birke"), _roster(2, "anker", "clara")
    assert examine(path, sign_roster(first, ROOT), ROOT.public).change is None
    _accept(path, first)
    offer = examine(path, sign_roster(second, ROOT), ROOT.public)
    assert offer.change is not None
    assert (offer.change.added, offer.change.removed) == (("clara",), ("birke",))
    assert read_pin(path) == first
    _accept(path, second)
    assert read_pin(path) == second


def test_an_older_roster_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "roster.pin"
    _accept(path, _roster(2, "anker", "birke"))
    for stale in (_roster(1, "anker", "birke", "sybil"), _roster(2, "anker", "sybil")):
        with pytest.raises(RosterMismatch, match="not newer"):
            _accept(path, stale)
    assert read_pin(path) == _roster(2, "anker", "birke")


def test_another_root_or_federation_is_not_the_pinned_one(tmp_path: Path) -> None:
    path = tmp_path / "roster.pin"
    _accept(path, _roster(1, "anker", "birke"))
    with pytest.raises(RosterMismatch, match="another federation"):
        _accept(path, _roster(2, "anker", "birke"), root=Identity.generate())
    with pytest.raises(RosterMismatch, match="another federation"):
        _accept(path, _roster(2, "anker", "birke", federation="south"))


def test_a_roster_that_the_root_did_not_sign_is_refused(tmp_path: Path) -> None:
    signed = sign_roster(_roster(1, "anker", "birke"), Identity.generate())
    with pytest.raises(RosterInvalid, match="not signed"):
        examine(tmp_path / "roster.pin", signed, ROOT.public)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x00" * 200])
def test_a_damaged_pin_is_a_named_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "roster.pin"
    _accept(path, _roster(1, "anker", "birke"))
    path.write_bytes(damage or path.read_bytes()[:-1])
    with pytest.raises(RosterInvalid):
        read_pin(path)
