"""One person, one unit: what is normalised, what is decided, and what is left apart."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.client.data.patients.mapping import PatientMapping, read_mapping
from cloister_fl.client.data.patients.units import (
    Decisions,
    Record,
    Units,
    folded,
    normalised,
)
from cloister_fl.client.site.folder import pseudonym
from cloister_fl.client.site.patient_settings import KINDS
from support.dicom import wide

KEY = b"k" * 32


def units(**settings: str) -> Units:
    return Units(KEY, Decisions(settings))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("", "12345"), ("", wide("12345"))),
        (("", "12345"), ("", "\u0661\u0662\u0663\u0664\u0665")),
        (("", "12345"), ("", "\u300012345\u00a0")),
        (("", "12345"), ("", "\u200b12345\ufeff")),
        (("", "Müller1"), ("", unicodedata.normalize("NFD", "Müller1"))),
        (("Hospital A", "7"), ("HOSPITAL a ", "7")),
        ((wide("HOSP"), "7"), ("hosp", "7")),
    ],
)
def test_one_number_in_two_spellings_is_one_unit(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    named = units()
    assert named.unit(*one) == named.unit(*other)
    assert named.pseudonym("s", *one) == named.pseudonym("s", *other)
    assert named.numbers(*one) == named.numbers(*other)


APART = {
    "issuers": (("A", "7"), ("", "7")),
    "components": (("", "7^^^A"), ("", "7")),
    "padding": (("", "P0012"), ("", "P12")),
    "case": (("", "ab1"), ("", "AB1")),
    "punctuation": (("", "12-34"), ("", "1234")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_could_join_two_people_joins_them_by_decision_alone(kind: str) -> None:
    # With components the authority stands for the issuer, so both are decided.
    also = {"issuers": "same"} if kind == "components" else {}
    one, other = APART[kind]
    for decision, same in (("ask", False), ("different", False), ("same", True)):
        named = units(**{kind: decision}, **also)
        assert (named.unit(*one) == named.unit(*other)) is same


@pytest.mark.parametrize(
    ("one", "other", "kinds", "same"),
    [
        # The issuer of a component is that of the element.
        (("A", "7"), ("", "7^^^a&1.2&ISO"), ["components"], True),
        (("", "7^^^A"), ("", "7^^^B"), ["components"], False),
        (("B", "7^^^A"), ("A", "7"), ["components"], False),
        # Zeros inside a number, or of another part of it, are the number.
        (("", "1-002"), ("", "1-2"), ["padding"], False),
        (("", "1002"), ("", "12"), ["padding"], False),
        (("", "000"), ("", "0"), ["padding"], True),
        (("", "P-007"), ("", "P-7"), ["padding"], True),
        (("", "0012"), ("", "12"), ["case", "issuers", "punctuation", "components"], False),
        (("", "^7"), ("", "7"), ["punctuation"], False),
        (("", "---"), ("", ""), ["punctuation"], False),
        (("", "^^^A"), ("", "^^^B"), ["components"], False),
    ],
)
def test_how_far_a_decision_reaches(
    one: tuple[str, str], other: tuple[str, str], kinds: list[str], same: bool
) -> None:
    assert (folded(normalised(*one), kinds) == folded(normalised(*other), kinds)) is same


@pytest.mark.long
@given(st.text(max_size=20), st.text(max_size=20))
def test_normalising_twice_changes_nothing(issuer: str, number: str) -> None:
    once = normalised(issuer, number)
    assert normalised(once.issuer, once.number) == once


def test_a_number_that_needs_nothing_keeps_its_pseudonym() -> None:
    assert units().pseudonym("s", "", "MRN00001") == pseudonym(KEY, "s", "", "MRN00001")


def _mapped(tmp_path: Path, text: str, **settings: str) -> PatientMapping:
    path = tmp_path / "patients.csv"
    path.write_text(text, encoding="utf-8")
    plain = units(**settings)
    rows = read_mapping(path, plain)
    kept = {
        plain.row(plain.record(one.record.issuer, one.record.number), one.person) for one in rows
    }
    decisions = Decisions(settings, tuple(sorted(kept)))
    return PatientMapping(rows, decisions, Units(KEY, decisions))


def test_two_numbers_of_the_mapping_are_one_unit_and_others_are_not(tmp_path: Path) -> None:
    text = "PatientID,IssuerOfPatientID,person\n7,A,x\n99,B,x\n5,,y\n"
    named = _mapped(tmp_path, text).units
    assert named.unit("a", wide("7")) == named.unit("B", " 99 ")
    assert named.unit("", "7") != named.unit("A", "7")
    assert named.unit("", "5") != named.unit("A", "7")
    # A labels file may name the person by either number.
    assert set(named.numbers("A", "7")) == {named.number("7"), named.number("99")}
    assert named.numbers("A", "7")[0] == named.number("7")
    assert named.numbers("", "7") == (named.number("7"),)


def test_a_person_of_the_mapping_is_no_number(tmp_path: Path) -> None:
    named = _mapped(tmp_path, "PatientID,person\n7,8\n").units
    assert named.unit("", "7") != named.unit("", "8")
    assert named.pseudonym("s", "", "7") != named.pseudonym("s", "", "8")


def test_decisions_hold_no_number_and_their_hash_tells_them_apart(tmp_path: Path) -> None:
    text = "PatientID,person\nCANARY7,CANARY\nCANARY8,CANARY\n"
    mapping = _mapped(tmp_path, text, case="same")
    assert "canary" not in repr(mapping).lower()
    assert mapping.decisions.words == "case=same"
    others = [
        _mapped(tmp_path, text.replace("8", "9"), case="same"),
        _mapped(tmp_path, text, case="different"),
        _mapped(tmp_path, text.replace("CANARY8,CANARY", "CANARY8,other"), case="same"),
    ]
    digests = {one.decisions.digest for one in (mapping, *others)}
    assert len(digests) == 4
    assert _mapped(tmp_path, text + "\n", case="same").decisions.digest == mapping.decisions.digest


def test_a_row_speaks_for_every_spelling_that_the_settings_make_one(tmp_path: Path) -> None:
    text = "PatientID,person\n0007,x\n99,x\n"
    named = _mapped(tmp_path, text, padding="same").units
    assert named.unit("", "7") == named.unit("", "099")
    assert Record("", "7") == named.record("", "007")
