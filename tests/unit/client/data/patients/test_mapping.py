"""The patients file, fault by fault; a message names lines and no patient."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_fl.client.data.patients.mapping import Assigned, mapping_of, read_mapping
from cloister_fl.client.data.patients.units import Decisions, Record, Units
from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.errors import PatientsFileInvalid
from support.dicom import wide


def _read(tmp_path: Path, text: str | bytes, **chosen: str) -> tuple[Assigned, ...]:
    path = tmp_path / "patients.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_mapping(path, Units(b"k" * 32, Decisions(chosen)))


def _fails(tmp_path: Path, text: str | bytes, **chosen: str) -> str:
    with pytest.raises(PatientsFileInvalid) as caught:
        _read(tmp_path, text, **chosen)
    assert caught.value.code == "CLO-255"
    message = str(caught.value)
    assert "CANARY" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffPatientID,IssuerOfPatientID,person\r\nP1,A,x\r\n",
        "PatientID;IssuerOfPatientID;person\nP1;A;x\n\n",
        "person\tnote\tPatientID\tIssuerOfPatientID\nx\ty\tP1\tA",
        f'"PatientID","IssuerOfPatientID","person"\n" {wide("P1")} ","a","x"\n',
    ],
)
def test_forms_that_people_save(tmp_path: Path, text: str) -> None:
    ((line, record, person),) = [
        (one.line, one.record, one.person) for one in _read(tmp_path, text)
    ]
    assert (line, record, person) == (2, Record("a", "P1"), "x")


_CELLS = st.text(st.sampled_from('ab1,;"\n\r\t \x0b\x85\u2028'), max_size=6)


@pytest.mark.long
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cells=st.lists(st.tuples(_CELLS, _CELLS), max_size=4), ends=st.sampled_from(("\n", "\r\n")))
def test_a_file_that_check_lets_pass_reads_the_same_line_by_line(
    tmp_path: Path, cells: list[tuple[str, str]], ends: str
) -> None:
    """Check read rows that a run, which nobody froze, left out."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ends).writerows([("PatientID", "person"), *cells])
    path = tmp_path / "patients.csv"
    path.write_bytes(text.getvalue().encode())
    units = Units(b"k" * 32, Decisions({}))
    try:
        whole = read_mapping(path, units)
    except PatientsFileInvalid:
        return
    assert read_mapping(path, units, alone=True) == whole


def test_every_faulty_line_is_listed_and_no_value(tmp_path: Path) -> None:
    message = _fails(
        tmp_path,
        "PatientID,IssuerOfPatientID,person\n"
        "CANARY1,,one\n"
        "CANARY2,,two\n"
        "CANARY1,,one\n"
        "CANARY1,,CANARY\n"
        ",,one\n"
        "CANARY3,,\n"
        "CANARY4\n"
        "CANARY2,CANARY,two\n"
        f"{wide('CANARY2')},,other\n",
    )
    assert "6 faults" in message
    for told in (
        "Line 4 names the number of line 2 again.",
        "Line 5 names the number of line 2 with another person.",
        "Line 6 has no PatientID.",
        "Line 7 has no person.",
        "Line 8 has another number of cells than the first line.",
        "Line 10 names the number of line 3 with another person.",
    ):
        assert f"\n  {told}" in message


def test_rows_that_the_settings_make_one_may_not_contradict_each_other(tmp_path: Path) -> None:
    text = "PatientID,person\n007,x\n7,y\n"
    assert len(_read(tmp_path, text)) == 2
    told = _fails(tmp_path, text, padding="same")
    assert "Line 3 names the number of line 2 with another person." in told
    # One person under both is no contradiction.
    assert len(_read(tmp_path, text.replace("y", "x"), padding="same")) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column 'PatientID'. Its first line is empty."),
        ("CANARY1,CANARY\n", "no column 'PatientID'. Its first line has 2 columns."),
        (
            "PatientID,Person\nCANARY,x\n",
            "no column 'person'. Its first line has 2 columns; column",
        ),
        ("PatientID,person,person\n", "has the column 'person' 2 times"),
        ("PatientID,person,IssuerOfPatientID,IssuerOfPatientID\n", "'IssuerOfPatientID' 2 times"),
        ('PatientID,person\nCANARY,"x\n', "Line 2 is not CSV"),
        (b"PatientID,person\nCANARY,\xff\n", "is not UTF-8 text: see line 2"),
        ('PatientID,person\nCANARY,"x\ny"\n', "Line 2 has a line break in a cell"),
        (f"PatientID,person\nC,{'x' * 65_536}\n", "Line 2 is longer than 65,536 characters"),
    ],
)
def test_files_that_cannot_be_read_as_a_table(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert told in _fails(tmp_path, text)


def test_a_missing_file_names_its_setting_and_no_path(tmp_path: Path) -> None:
    site = init_site(tmp_path / "north")
    text = (site.root / "site.toml").read_text().replace('mapping = ""', 'mapping = "CANARY.csv"')
    (site.root / "site.toml").write_text(text)
    with pytest.raises(PatientsFileInvalid) as caught:
        mapping_of(open_site(site.root))
    assert "data.patients.mapping" in str(caught.value)
    assert "CANARY" not in str(caught.value)
