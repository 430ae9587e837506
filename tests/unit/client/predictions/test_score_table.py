"""The table of scores: what its cells hold, and what its pseudonyms keep."""

from __future__ import annotations

import csv
import io
import re
import secrets

import numpy as np
import pytest

from cloister_fl.client.data.patients.units import keyed
from cloister_fl.client.predictions.calls import rule_of
from cloister_fl.client.predictions.score_table import (
    Layout,
    Scored,
    patients_of,
    table_of,
)
from cloister_fl.model_file import OperatingPoint
from cloister_fl.system.text import as_cell

CLASSES = ("normal", "nodule")


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        *((one, one) for one in ("", "P1", "a/b-1.dcm", "2.25.1", "x = 1", "a-b@c", "Ü;b", "'=1")),
        *((f"{sign}1", f"'{sign}1") for sign in "=+-@\uff1d\uff0b\uff0d\uff20"),
        ("  =1", "'  =1"),
        ('"=1', "'\"=1"),
        ("\tx", "'\tx"),
        ("a;=1", "a;'=1"),
        ("a\t =1", "a\t' =1"),
        ("a\n@x", "a\n'@x"),
        ('a;"=1', "a;'\"=1"),
    ],
)
def test_no_cell_is_a_formula(cell: str, written: str) -> None:
    assert as_cell(cell) == written


def test_every_text_of_others_is_made_one() -> None:
    image = Scored("-1", b"@x", "", "=2")
    table = table_of([image], np.array([[0.25]]), Layout("=u", ("=s",), None, patient_ids=True))
    head, row = csv.reader(io.StringIO(table.decode(), newline=""))
    assert head == ["'=u", "file", "patient", "PatientID", "'=s", "patient_=s"]
    assert [*row[:2], row[3]] == ["'-1", "'@x", "'=2"]
    assert row[4:] == ["0.250000", "0.250000"]
    two = Layout("uid", ("a", "b"), rule_of(("=a", "+b"), None))
    assert table_of([image], np.array([[0.6, 0.4]]), two).decode().endswith(",'=a\r\n")


def test_a_path_that_is_no_text_is_written() -> None:
    image = Scored("1", b"\xff/\xc3\xbc", "", "\ud800")
    table = table_of([image], np.array([[1.0]]), Layout("u", ("s",), patient_ids=True))
    assert r"\xff/ü" in table.decode()


def test_pseudonyms_are_the_patients_of_one_table() -> None:
    images = [
        Scored(str(number), b"", issuer, patient)
        for number, (issuer, patient) in enumerate(
            [("A", "1"), ("a", " \uff11"), ("B", "1"), ("", "1"), ("A", "01")]
        )
    ]
    first, second = patients_of(images), patients_of(images)
    assert first[0] == first[1]
    assert len(set(first)) == 4
    assert not set(first) & set(second)
    assert all(re.fullmatch("p[0-9a-f]{16}", one) for one in first)


def test_pseudonyms_are_keyed_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key a number cannot be tried, and the key is 32 random bytes, drawn once."""
    drawn: list[int] = []
    monkeypatch.setattr(secrets, "token_bytes", lambda n: drawn.append(n) or bytes(n))
    (name,) = patients_of([Scored("1", b"", "", "P1")])
    assert drawn == [32]
    assert name == "p" + keyed(bytes(32), "table", "", "P1")[:16]


@pytest.mark.parametrize(
    ("point", "score", "call"),
    [
        (None, 0.5, "nodule"),
        (None, 0.4999, "normal"),
        (OperatingPoint("nodule", 0.31, 9), 0.31, "nodule"),
        (OperatingPoint("nodule", 0.31, 9), 0.3099, "normal"),
        (OperatingPoint("normal", 0.31, 9), 0.69, "normal"),
        (OperatingPoint("normal", 0.31, 9), 0.7, "nodule"),
    ],
)
def test_two_classes_are_called_at_a_threshold(
    point: OperatingPoint | None, score: float, call: str
) -> None:
    rule = rule_of(CLASSES, point)
    assert rule is not None
    assert rule.call(np.array([round(1 - score, 6), score])) == call
    assert (rule.threshold, rule.chosen) == (point.threshold if point else 0.5, point)


def test_more_classes_are_called_by_the_highest_and_none_not_at_all() -> None:
    rule = rule_of((*CLASSES, "cyst"), None)
    assert rule is not None
    assert rule.call(np.array([0.3, 0.3, 0.4])) == "cyst"
    assert rule.threshold is None
    assert rule.told.endswith("No operating point was chosen for this model.")
    assert rule_of((), None) is None


def test_a_call_is_of_the_mean_and_not_of_the_image() -> None:
    images = [Scored("1", b"", "", "P1"), Scored("2", b"", "", "P1"), Scored("3", b"", "", "P2")]
    scores = np.array([[0.9, 0.1], [0.0, 1.0], [0.6, 0.4]])
    layout = Layout("uid", ("n", "p"), rule_of(CLASSES, None))
    rows = list(csv.reader(io.StringIO(table_of(images, scores, layout).decode(), newline="")))
    assert [row[5:] for row in rows[1:]] == [
        ["0.450000", "0.550000", "nodule"],
        ["0.450000", "0.550000", "nodule"],
        ["0.600000", "0.400000", "normal"],
    ]
