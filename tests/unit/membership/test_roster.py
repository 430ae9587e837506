from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.errors import RosterInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, compare, open_roster, sign_roster
from support.secagg import identity_of, roster_of, site_names

ROOT = identity_of("root")
ROSTER = roster_of(site_names(5))


def test_round_trip() -> None:
    assert Roster.decode(ROSTER.encode()) == ROSTER
    assert open_roster(sign_roster(ROSTER, ROOT), ROOT.public) == ROSTER
    assert ROSTER.keys == {name: identity_of(name).public for name in site_names(5)}
    assert ROSTER.public_key("site-02") == identity_of("site-02").public
    assert ROSTER.public_key("site-09") is None


def test_signature_of_another_root() -> None:
    with pytest.raises(RosterInvalid):
        open_roster(sign_roster(ROSTER, Identity.generate()), ROOT.public)


@given(st.data())
def test_altered_file(data: st.DataObject) -> None:
    altered = bytearray(sign_roster(ROSTER, ROOT))
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RosterInvalid):
        open_roster(bytes(altered), ROOT.public)


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_cut_file(cut: int) -> None:
    whole = sign_roster(ROSTER, ROOT)
    for data in (whole[:-cut], whole + bytes(cut)):
        with pytest.raises(RosterInvalid):
            open_roster(data, ROOT.public)


def entry(site: str, **changes: object) -> RosterEntry:
    return replace(RosterEntry(site, identity_of(site).public), **changes)


@pytest.mark.parametrize(
    "entries",
    [
        (entry("b"), entry("a")),
        (entry("a"), entry("a")),
        (entry("a"), entry("b", public_key=identity_of("a").public)),
        (entry("A"),),
        (entry(""),),
        (entry("a/b"),),
        (entry("a", public_key=bytes(32)),),
        (entry("a", public_key=b"short"),),
    ],
)
def test_rosters_that_are_refused(entries: tuple[RosterEntry, ...]) -> None:
    with pytest.raises(RosterInvalid):
        Roster("federation", 1, entries)


def test_serial_and_federation() -> None:
    for federation, serial in (("", 1), ("f", -1), ("f", 2**64)):
        with pytest.raises(RosterInvalid):
            Roster(federation, serial, ROSTER.entries)


def test_another_roster_has_another_digest() -> None:
    others = (
        replace(ROSTER, serial=2),
        replace(ROSTER, federation="other"),
        replace(ROSTER, entries=ROSTER.entries[:-1]),
    )
    assert len({ROSTER.digest, *(other.digest for other in others)}) == 4


def test_what_a_steward_is_shown() -> None:
    kept = [row for row in ROSTER.entries if row.site != "site-01"]
    kept[1] = replace(kept[1], public_key=identity_of("someone").public)
    offered = Roster.of("federation", 2, [*kept, entry("site-99")])
    change = compare(ROSTER, offered)
    assert change.added == ("site-99",)
    assert change.removed == ("site-01",)
    assert change.rekeyed == ("site-03",)
    assert not change.rolled_back
    assert compare(offered, ROSTER).rolled_back
    same = compare(ROSTER, ROSTER)
    assert not any((same.added, same.removed, same.rekeyed, same.rolled_back))
