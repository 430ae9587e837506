"""A table of labels in a workbook of Excel, sound and hostile."""

from __future__ import annotations

import zipfile
from datetime import datetime
from pathlib import Path

import pytest

from cloister_fl.client.data.labels.label_file import read_labels, sound_labels
from cloister_fl.client.data.tables import spreadsheet
from cloister_fl.client.data.tables.spreadsheet_worker import told
from cloister_fl.client.site.label_settings import LabelSettings
from cloister_fl.errors import LabelsInvalid
from cloister_fl.tasks.classification import Classification
from support.workbooks import write_workbook

pytestmark = pytest.mark.process

TASK = Classification("finding", ("normal", "nodule"))
GERMAN = LabelSettings(
    columns={"PatientID": "Patienten-ID", "finding": "Befund"},
    values={"finding": {"o. B.": "normal", "TRUE": "nodule"}},
)
ROWS = [
    ["Patienten-ID", "Befund", "Datum"],
    [4711, "o. B.", 44000.5],
    ["0012", "nodule"],
    [None, None],
    [12345678901234, True],
]


def fails(path: Path, settings: LabelSettings = GERMAN) -> str:
    with pytest.raises(LabelsInvalid) as caught:
        read_labels(path, TASK, settings=settings)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


def test_a_table_of_excel_is_read_as_it_is(tmp_path: Path) -> None:
    """Whole numbers have no fraction, and text keeps its leading zeros."""
    path = write_workbook(tmp_path / "befunde.XLSX", {"Tabelle1": ROWS, "Notizen": [["x"]]})
    labels = read_labels(path, TASK, settings=GERMAN)
    assert {key: (row.line, row.value) for (_, key), row in labels.rows.items()} == {
        "4711": (2, 0), "0012": (3, 1), "12345678901234": (5, 1),
    }  # fmt: skip


def test_a_sheet_is_found_by_its_name(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", {"Notizen": [["x"]], "Blatt 2": ROWS})
    settings = GERMAN.model_copy(update={"sheet": "Blatt 2"})
    assert len(read_labels(path, TASK, settings=settings).rows) == 3
    assert "no column" in fails(path)
    assert "no sheet of that name" in fails(path, GERMAN.model_copy(update={"sheet": "Blatt 3"}))


def test_a_table_may_begin_below_empty_rows(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", {"T": [[], [], *ROWS]})
    labels = read_labels(path, TASK, settings=GERMAN)
    assert [row.line for row in labels.rows.values()] == [4, 5, 7]


def test_every_faulty_row_is_listed(tmp_path: Path) -> None:
    rows = [*ROWS, ["0012", "normal"], ["CANARY", "what"]]
    message = fails(write_workbook(tmp_path / "a.xlsx", {"T": rows}))
    assert "Line 6 has another label than line 3 of the same PatientID" in message
    assert "Line 7 has a class that the study does not name" in message
    assert "CANARY" not in message


def test_what_is_no_workbook_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    for data in (b"", b"PatientID,finding\n", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(data)
        assert "not a workbook of Excel" in fails(path)


def test_a_bomb_takes_its_own_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.xlsx"
    write_workbook(path, {"T": ROWS})
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    row = b"<row>" + b'<c t="inlineStr"><is><t>x</t></is></c>' * 2_000 + b"</row>"
    parts["xl/sheet1.xml"] = parts["xl/sheet1.xml"].replace(b'<row r="1">', row * 300, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    assert path.stat().st_size < 4 << 20
    monkeypatch.setattr(spreadsheet, "SECONDS", 5.0)
    monkeypatch.setattr(spreadsheet, "MAX_TOLD", 1 << 20)
    message = fails(path)
    assert "took more than the memory or the time" in message or "damaged" in message


def test_a_workbook_is_read_for_frozen_data_alone(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", {"T": ROWS})
    with pytest.raises(LabelsInvalid, match="a workbook, which is read for data that are frozen"):
        sound_labels(path, TASK, settings=GERMAN)


@pytest.mark.parametrize(
    ("cell", "text"),
    [(12.0, "12"), (12.5, "12.5"), (True, "TRUE"), (False, "FALSE"), ("0012", "0012"), (3, "3"),
     (1e300, "1e+300"), (float("nan"), "nan"), (datetime(2026, 3, 1), "2026-03-01"),
     (datetime(2026, 3, 1, 12), "2026-03-01 12:00:00"), ("x" * 70_000, "x" * 65_536)],
)  # fmt: skip
def test_cells_as_a_person_sees_them(cell: object, text: str) -> None:
    assert told(cell) == text
