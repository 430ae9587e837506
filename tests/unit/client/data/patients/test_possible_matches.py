"""Numbers that may be one person's are found, and stop being found once they are decided."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.client.data.patients.mapping import PatientMapping, mapping_of
from cloister_fl.client.data.patients.possible_matches import (
    Known,
    Match,
    lines_without_image,
    undecided,
    undecided_error,
)
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.patient_settings import KINDS
from support.dicom import wide

PAIRS = {
    "issuers": [Known("A", "7"), Known("", "7")],
    "components": [Known("", "7^X"), Known("", "7")],
    "padding": [Known("", "0007"), Known("", "7")],
    "case": [Known("", "ab7"), Known("", "AB7")],
    "punctuation": [Known("", "12.34"), Known("", "1234")],
    "names": [Known("", "1", "f" * 64), Known("", "2", "f" * 64)],
}


def _site(root: Path, rows: str = "", **settings: str) -> Site:
    site = init_site(root)
    text = (site.root / "site.toml").read_text()
    for key, value in settings.items():
        assert f'{key} = "ask"' in text
        text = text.replace(f'{key} = "ask"', f'{key} = "{value}"')
    if rows:
        (site.root / "patients.csv").write_text(f"PatientID,IssuerOfPatientID,person\n{rows}")
        text = text.replace('mapping = ""', 'mapping = "patients.csv"')
    (site.root / "site.toml").write_text(text)
    return open_site(site.root)


def _found(site: Site, known: Sequence[Known]) -> tuple[Match, ...]:
    return undecided(known, mapping_of(site), site.patients)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_person_with_two_numbers_is_reported_until_it_is_decided(
    tmp_path: Path, kind: str
) -> None:
    known = PAIRS[kind]
    (match,) = _found(_site(tmp_path / "ask"), [*known, Known("", "other")])
    assert (match.reasons, match.patients, len(match.records)) == ((kind,), 2, 2)
    decisions = ("different",) if kind == "names" else ("same", "different")
    for decision in decisions:
        assert _found(_site(tmp_path / decision, **{kind: decision}), known) == ()
    for name, other in (("joined", "x"), ("apart", "y")):
        rows = "".join(
            f"{one.number},{one.issuer},{person}\n"
            for one, person in zip(known, ("x", other), strict=True)
        )
        assert _found(_site(tmp_path / name, rows), known) == ()
    # A row for one of the two says nothing of the other.
    (half,) = _found(_site(tmp_path / "half", f"{known[0].number},{known[0].issuer},x\n"), known)
    assert half.reasons == (kind,)


def test_numbers_that_differ_in_two_ways_are_one_set_with_both_reasons(tmp_path: Path) -> None:
    known = [Known("A", "007"), Known("", "7")]
    (match,) = _found(_site(tmp_path / "a"), known)
    assert match.reasons == ("issuers", "padding")
    (match,) = _found(_site(tmp_path / "b", issuers="same"), known)
    assert match.reasons == ("padding",)
    # Of two people by their issuers, whatever the zeros.
    assert _found(_site(tmp_path / "c", issuers="different"), known) == ()


def test_issuers_that_tell_people_apart_do_not_silence_a_name(tmp_path: Path) -> None:
    known = [Known("A", "7", "f" * 64), Known("B", "7", "f" * 64)]
    (match,) = _found(_site(tmp_path, issuers="different"), known)
    assert match.reasons == ("names",)


def test_a_mappings_person_that_is_a_number_without_a_row_is_reported(tmp_path: Path) -> None:
    # Who writes "7 is 8" means that 7 and 8 are one.
    known = [Known("", "7"), Known("", "8")]
    (match,) = _found(_site(tmp_path / "a", "7,,8\n"), known)
    assert match.reasons == ("person",)
    assert _found(_site(tmp_path / "b", "7,,8\n8,,8\n"), known) == ()


def test_a_placeholder_that_is_everybodys_name_is_one_set(tmp_path: Path) -> None:
    known = [Known("", str(number), "f" * 64) for number in range(20_000)]
    (match,) = _found(_site(tmp_path), known)
    assert match.patients == 20_000


def test_numbers_of_different_people_are_not_reported(tmp_path: Path) -> None:
    known = [Known("A", f"MRN{n:05d}", f"{n:064x}") for n in range(200)]
    assert _found(_site(tmp_path), known) == ()


numbers = st.text(st.sampled_from("01aA-^ ."), min_size=1, max_size=5)


@given(pairs=st.lists(st.tuples(st.sampled_from(("", "A", "b")), numbers), min_size=2, max_size=6))
def test_every_pair_that_some_decision_would_join_is_reported_and_no_other(
    pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp()
    (ask, site), (same, _) = (
        _once(root / "ask"),
        _once(root / "same", **dict.fromkeys(KINDS, "same")),
    )
    found = undecided([Known(*pair) for pair in pairs], ask, site.patients)
    reported = {
        frozenset((ask.units.unit(one.issuer, one.number), ask.units.unit(two.issuer, two.number)))
        for match in found
        for one, two in combinations(match.records, 2)
    }
    joined = {
        frozenset((ask.units.unit(*one), ask.units.unit(*two)))
        for one, two in combinations(pairs, 2)
        if same.units.unit(*one) == same.units.unit(*two)
    }
    assert reported == {pair for pair in joined if len(pair) == 2}


_SITES: dict[Path, tuple[PatientMapping, Site]] = {}


def _once(root: Path, **settings: str) -> tuple[PatientMapping, Site]:
    if root not in _SITES:
        site = _site(root, **settings)
        _SITES[root] = (mapping_of(site), site)
    return _SITES[root]


def test_the_error_counts_and_says_what_to_write_and_names_nobody(tmp_path: Path) -> None:
    site = _site(tmp_path / "north")
    known = [
        *(Known("CANARY", f"CANARY{n}", "e" * 64) for n in range(2)),
        Known("", "CANARY1"),
    ]
    error = undecided_error(site, _found(site, known))
    assert error is not None
    assert error.code == "CLO-254"
    told = str(error)
    assert "CANARY" not in told
    assert "e" * 12 not in told
    assert "2 sets of patient numbers" in told
    assert "\n  1 set: one number under several issuers (issuers)" in told
    assert "\n  1 set: one name and birth date (names)" in told
    assert f"cloister client patients --out patients-found.csv --dir {site.root}" in told
    assert 'issuers = "same"' in told
    assert "padding" not in told
    assert undecided_error(site, ()) is None


def test_lines_that_speak_of_no_image(tmp_path: Path) -> None:
    site = _site(tmp_path, "7,A,x\n8,,x\n9,,x\n")
    known = [Known("a", wide("7")), Known("", "9")]
    assert lines_without_image(known, mapping_of(site)) == (3,)
