"""The labels file and its join, fault by fault."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.client.data.labels.label_file import Labels, read_labels, sound_labels
from cloister_fl.client.data.labels.row_matching import Linked, join
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.site.label_settings import LabelSettings, composed
from cloister_fl.errors import DataError, LabelMissing, LabelsInvalid, LabelWithoutImage
from cloister_fl.tasks.classification import Classification
from support.errors import is_of, raises

TASK = Classification("finding", ("normal", "nodule", "mass"))
PLAIN = LabelSettings()
GERMAN = LabelSettings(
    columns={"PatientID": "Patienten-ID", "finding": "Befund"},
    values={"finding": {"o. B.": "normal", "Rundherd": "nodule", "Läsion": "mass"}},
)


def _read(tmp_path: Path, text: str | bytes, settings: LabelSettings = PLAIN) -> Labels:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, TASK, settings=settings)


def _fails(tmp_path: Path, text: str | bytes, settings: LabelSettings = PLAIN) -> str:
    with pytest.raises(LabelsInvalid) as caught:
        _read(tmp_path, text, settings)
    return str(caught.value)


KEYS = "'SOPInstanceUID', 'AccessionNumber', 'StudyInstanceUID' or 'PatientID'"
NO_KEY = f"no column {KEYS}"


def _image(instance: str, patient: str, *, duplicate: bool = False, issuer: str = "") -> Linked:
    keys = Keys(instance, f"acc-{patient}", patient, issuer)
    return Linked(keys, f"pseudonym-{issuer}{patient}", duplicate)


def _values(labels: Labels) -> dict[str, tuple[int, int]]:
    return {key: (label.line, label.value) for (_, key), label in labels.rows.items()}


def _columns(labels: Labels) -> list[str]:
    return [column for column, _ in labels.rows]


def test_reads_keys_lines_and_classes(tmp_path: Path) -> None:
    labels = _read(tmp_path, "PatientID,finding\nP1,normal\n P2 , mass \n\nP3,nodule\n")
    assert set(_columns(labels)) == {"PatientID"}
    assert _values(labels) == {"P1": (2, 0), "P2": (3, 2), "P3": (5, 1)}


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffPatientID,finding\r\nP1,nodule\r\n",
        "PatientID;finding\nP1;nodule\n",
        "PatientID\tfinding\nP1\tnodule",
        '"finding","PatientID"\n"nodule","P1"\n',
        "note,PatientID,finding\n,P1,nodule\n",
    ],
)
def test_forms_that_people_save(tmp_path: Path, text: str) -> None:
    assert _values(_read(tmp_path, text)) == {"P1": (2, 1)}


def test_the_first_key_column_counts(tmp_path: Path) -> None:
    head = "PatientID,AccessionNumber,SOPInstanceUID,finding\nP1,A1,1.2,mass\n"
    assert _columns(_read(tmp_path, head)) == ["SOPInstanceUID"]
    assert _columns(_read(tmp_path, head.replace("SOPInstanceUID", "x"))) == ["AccessionNumber"]


def test_an_empty_key_column_does_not_beat_a_filled_one(tmp_path: Path) -> None:
    """Each row by itself: whether others have a key there says nothing of this one's."""
    text = (
        "SOPInstanceUID,AccessionNumber,PatientID,finding\n,,P1,normal\n,A2,P2,mass\n1.2,,,mass\n"
    )
    labels = _read(tmp_path, text)
    assert list(labels.rows) == [
        ("PatientID", "P1"), ("AccessionNumber", "A2"), ("SOPInstanceUID", "1.2")
    ]  # fmt: skip
    assert "Line 2 has no SOPInstanceUID or PatientID" in _fails(
        tmp_path, "SOPInstanceUID,PatientID,finding\n,,normal\n"
    )


def test_the_most_exact_row_speaks_for_an_image(tmp_path: Path) -> None:
    labels = _read(tmp_path, "SOPInstanceUID,PatientID,finding\n,a,mass\ni2,,mass\n,b,normal\n")
    images = [_image("i1", "a"), _image("i2", "a"), _image("i3", "b")]
    found, errors = join(labels, images)
    assert [label and label.line for label in found] == [2, 3, 4]
    assert errors == []


def test_a_table_in_the_hospitals_own_words_is_read_as_it_is(tmp_path: Path) -> None:
    text = "Patienten-ID;Befund;finding\nP1;o. B.;x\nP2;Rundherd;y\nP3;Läsion;\nP4;normal;z\n"
    labels = _read(tmp_path, text, GERMAN)
    assert _values(labels) == {"P1": (2, 0), "P2": (3, 1), "P3": (4, 2), "P4": (5, 0)}
    # Frozen are the study's words: what site.toml says later changes nothing.
    assert [label.cells for label in labels.rows.values()][:3] == [
        ("normal",), ("nodule",), ("mass",)
    ]  # fmt: skip


def test_a_column_that_was_named_and_is_not_there_is_told(tmp_path: Path) -> None:
    message = _fails(tmp_path, "PatientID;Befund\nP1;o. B.\n", GERMAN)
    assert f"has {NO_KEY}." in message
    assert "[data.labels] in site.toml names 'Patienten-ID' for PatientID" in message
    message = _fails(tmp_path, "Patienten-ID;Diagnose\nP1;o. B.\n")
    assert 'columns = { finding = "...", PatientID = "..." }' in message


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-8"), ("cp1252", "cp1252"),
     ("utf-16-le", "utf-16")],
)  # fmt: skip
def test_encodings_of_programs_that_people_use(
    tmp_path: Path, encoding: str, named: Literal["utf-8", "utf-16", "cp1252"]
) -> None:
    data = "Patienten-ID;Befund\r\nMüller;Läsion\r\n".encode(encoding)
    settings = GERMAN.model_copy(update={"encoding": named})
    assert _values(_read(tmp_path, data, settings)) == {"Müller": (2, 2)}


def test_a_file_in_another_encoding_is_told_how_to_be_read(tmp_path: Path) -> None:
    message = _fails(tmp_path, "PatientID;finding\nMüller;mass\n".encode("cp1252"))
    assert "not UTF-8 text: see line 2" in message
    assert 'encoding = "cp1252"' in message


@pytest.mark.parametrize("mark", [";", ",", "\t", "|"])
def test_a_line_that_says_what_separates_cells(tmp_path: Path, mark: str) -> None:
    text = f"sep={mark}\nPatientID{mark}finding\nP1{mark}mass\n"
    assert _values(_read(tmp_path, text)) == {"P1": (3, 2)}
    path = tmp_path / "labels.csv"
    assert _values(sound_labels(path, TASK)) == {"P1": (3, 2)}


def test_an_umlaut_is_one_however_it_is_typed(tmp_path: Path) -> None:
    task = Classification("Läsion", ("nein", "größer"))
    path = tmp_path / "labels.csv"
    for form in ("NFC", "NFD"):
        text = "PatientID,Läsion\nMüller,größer\n"
        path.write_text(unicodedata.normalize(form, text))
        for read in (read_labels, sound_labels):
            (label,) = read(path, task).rows.values()
            assert label.value == 1
    typed = replace(task, column=unicodedata.normalize("NFD", task.column))
    assert len(read_labels(path, typed).rows) == 1
    image = Linked(Keys("i1", "", unicodedata.normalize("NFD", "Müller"), ""), "pseudonym")
    found, errors = join(read_labels(path, task), [image])
    assert found[0] is not None
    assert errors == []


def test_utf_16_is_read_for_frozen_data_alone(tmp_path: Path) -> None:
    """One byte that a row lacks would turn every row behind it into another text."""
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,finding\nP1,mass\n", "utf-16")
    with pytest.raises(LabelsInvalid, match="UTF-16"):
        sound_labels(path, TASK, settings=LabelSettings(encoding="utf-16"))
    with pytest.raises(LabelsInvalid):
        sound_labels(path, TASK)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("12", "leading zeros in PatientID (line 2)"),
        ("p0012", "leading zeros in PatientID (line 2)"),
        ("AB-12", "spaces, hyphens, dots or slashes in PatientID (line 2)"),
        ("ab12", "capitals and small letters in PatientID (line 2)"),
        ("0012.0", "a trailing .0, as spreadsheets add it, in PatientID (line 2)"),
    ],
)
def test_rows_that_almost_fit_are_diagnosed(tmp_path: Path, written: str, why: str) -> None:
    numbers = {"12": "0012", "p0012": "p12", "AB-12": "AB12", "ab12": "AB12", "0012.0": "0012"}
    labels = _read(tmp_path, f"PatientID,finding\n{written},mass\nb,normal\n")
    images = [_image("i1", numbers[written]), _image("i2", "b")]
    _, (missing, unused) = join(labels, images)
    for error in (missing, unused):
        assert f"1 row would fit but for {why}" in str(error)
        assert written not in str(error).replace("line 2", "")


def test_line_numbers_hold_behind_cells_of_several_lines(tmp_path: Path) -> None:
    text = 'PatientID,finding,note\nP1,normal,"two\nlines"\nP2,CANARY,x\n'
    assert "Line 4 has a class" in _fails(tmp_path, text)


def test_every_faulty_line_is_listed_and_no_value(tmp_path: Path) -> None:
    message = _fails(
        tmp_path,
        "PatientID,finding\n"
        "CANARY1,normal\n"
        "CANARY2,CANARY\n"
        ",normal\n"
        "CANARY3,\n"
        "CANARY1,normal\n"
        "CANARY1,mass\n"
        "CANARY4\n"
        "CANARY5,normal,extra\n"
        "CANARY6,Normal\n",
    )
    assert "CANARY" not in message
    assert "7 faults" in message
    for lines, words in {
        "Lines 3 and 10": "have a class that the study does not name",
        "Line 4": "has no PatientID",
        "Line 5": "has no finding",
        # Line 6 says of the same patient what line 2 says.
        "Line 7": "has another label than line 2 of the same PatientID",
        "Lines 8 and 9": "have another number of cells",
    }.items():
        assert f"  {lines} {words}" in message
    assert "normal, nodule, mass" in message


def test_a_table_of_examinations_names_a_patient_again(tmp_path: Path) -> None:
    """Rows that agree are one; of three of which one disagrees, none is."""
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,finding,date\nP1,mass,1\nP1,mass,2\nP2,normal,3\n")
    labels = read_labels(path, TASK)
    assert {key: row.line for (_, key), row in labels.rows.items()} == {"P1": 2, "P2": 4}
    path.write_text("PatientID,finding\nP1,mass\nP1,normal\nP1,mass\nP2,normal\n")
    kept = sound_labels(path, TASK)
    assert [key for _, key in kept.rows] == ["P2"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an older Excel (.xls)"),
        (b"PK\x03\x04" + bytes(600), "does not end in .xlsx"),
    ],
)
def test_a_workbook_in_place_of_csv_is_told_as_one(tmp_path: Path, data: bytes, words: str) -> None:
    """It was said to be text of another encoding."""
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    with raises(LabelsInvalid, match=re.escape(words)) as error:
        read_labels(path, TASK)
    assert "Save it as .xlsx" in str(error.value)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    rows = "".join(f"x{number},y\n" for number in range(50))
    message = _fails(tmp_path, "PatientID,finding\n" + rows)
    assert message.count("\n  Line") == 1
    assert "and 30 more" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", f"has {NO_KEY}. Its first line is empty. "),
        ("\n", f"has {NO_KEY}. Its first line is empty. "),
        (
            "patientid,finding\nP1,normal\n",
            f"has {NO_KEY}. Its first line has 2 columns; column 1 is 'PatientID' except for case, "
            "spaces or punctuation. ",
        ),
        (
            "CANARY;Accession-Number \ufeff;patient_ID;finding\n",
            f"has {NO_KEY}. Its first line has 4 columns; column 2 is 'AccessionNumber' except for "
            "case, spaces or punctuation; column 3 is 'PatientID' except for ",
        ),
        ("CANARY-ID;Canary\nP1;normal\n", f"has {NO_KEY}. Its first line has 2 columns. "),
        ("CANARY1,normal\n", f"has {NO_KEY}. Its first line has 2 columns. "),
        ("CANARY^ANNA,normal\n", f"has {NO_KEY}. Its first line has 2 columns. "),
        ("Canary Anna,suspicious,Clara\n", f"has {NO_KEY}. Its first line has 3 columns. "),
        (
            "CANARY|finding\n",
            f"has {NO_KEY}. Its first line has 1 column; columns are separated by commas, "
            "semicolons or tabs. ",
        ),
        (
            "PatientID,Finding\nP1,normal\n",
            "has no column 'finding'. Its first line has 2 columns; column 2 is 'finding' except "
            "for case, ",
        ),
        ("PatientID,finding,finding\nP1,normal,mass\n", "has the column 'finding' 2 times."),
        ("PatientID,PatientID,finding\nP1,P1,normal\n", "has the column 'PatientID' 2 times."),
    ],
)
def test_columns_that_lack_or_repeat(tmp_path: Path, text: str, what: str) -> None:
    message = _fails(tmp_path, text)
    assert f"The labels file {what}" in message
    assert "AccessionNumber, StudyInstanceUID or PatientID, and one 'finding'" in (message)
    for word in ("canary", "anna", "clara", "suspicious"):
        assert word not in message.casefold()


@pytest.mark.parametrize("cell", ["Nodule", "nodule", "NO DULE"])
def test_a_column_that_is_called_like_a_class_is_not_found_in_a_patients_row(
    tmp_path: Path, cell: str
) -> None:
    """The first line of a file without a header would tell the first patient's class."""
    target = Classification("nodule", ("none", "Nodule"))
    path = tmp_path / "labels.csv"
    messages = set()
    for first in (cell, "none"):
        path.write_text(f"Meier,{first}\nHuber,none\n")
        with pytest.raises(LabelsInvalid) as caught:
            read_labels(path, target)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_the_length_of_a_message_is_bounded(tmp_path: Path) -> None:
    assert len(_fails(tmp_path, ",".join(["patientid"] * 5000))) < 3000


def test_not_utf8(tmp_path: Path) -> None:
    assert "not UTF-8 text: see line 2" in _fails(
        tmp_path, b"PatientID,finding\nM\xfcller,normal\n"
    )


def test_broken_quotes_and_nul(tmp_path: Path) -> None:
    assert "Line 3 is not CSV" in _fails(
        tmp_path, 'PatientID,finding\nP1,normal\n"P2"x,normal\nP3,normal\n'
    )
    assert "Line 2 is not CSV" in _fails(tmp_path, 'PatientID,finding\n"P1,normal\nP2,normal\n')


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "CANARY.csv", tmp_path):
        with pytest.raises(LabelsInvalid) as caught:
            read_labels(path, TASK)
        assert "CANARY" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def _joined(labels: Labels, images: list[Linked]) -> tuple[list[object], list[DataError]]:
    """Values for the rows of ``join``."""
    found, errors = join(labels, images)
    return [None if label is None else label.value for label in found], errors


@pytest.mark.parametrize(
    ("column", "keys"),
    [("SOPInstanceUID", ("i1", "i2", "i3")), ("AccessionNumber", ("acc-a", "acc-b"))],
)
def test_join(tmp_path: Path, column: str, keys: tuple[str, ...]) -> None:
    classes = {"i1": "normal", "i2": "normal", "i3": "mass", "acc-a": "normal", "acc-b": "mass"}
    rows = "".join(f"{key},{classes[key]}\n" for key in keys)
    labels = _read(tmp_path, f"{column},finding\n{rows}")
    images = [_image("i1", "a"), _image("i2", "a"), _image("i3", "b")]
    assert _joined(labels, images) == ([0, 0, 2], [])


def test_image_without_label(tmp_path: Path) -> None:
    labels = _read(tmp_path, "PatientID,finding\na,normal\n")
    values, (error,) = _joined(labels, [_image("i1", "a"), _image("i2", "b"), _image("i3", "b")])
    assert values == [0, None, None]
    assert is_of(error, LabelMissing)
    assert "2 images have no label" in str(error)
    assert "pseudonym-b"[:12] in str(error)


def test_label_without_image(tmp_path: Path) -> None:
    labels = _read(tmp_path, "PatientID,finding\nCANARY1,mass\na,normal\nCANARY2,mass\n")
    values, (error,) = _joined(labels, [_image("i1", "a")])
    assert values == [0]
    assert isinstance(error, LabelWithoutImage)
    assert "2 labels belong to no image" in str(error)
    assert "Lines of the labels file: 2, 4." in str(error)
    assert "CANARY" not in str(error)


def test_a_patient_of_two_classes(tmp_path: Path) -> None:
    labels = _read(tmp_path, "SOPInstanceUID,finding\ni1,normal\ni2,normal\ni3,mass\n")
    images = [_image("i1", "a"), _image("i2", "b"), _image("i3", "a")]
    _, (error,) = join(labels, images)
    assert isinstance(error, LabelsInvalid)
    assert "Lines 2 and 4 give one patient two classes." in str(error)


def test_a_row_for_two_patients(tmp_path: Path) -> None:
    labels = _read(tmp_path, "PatientID,finding\na,normal\n")
    images = [_image("i1", "a", issuer="north"), _image("i2", "a", issuer="south")]
    _, (error,) = join(labels, images)
    assert isinstance(error, LabelsInvalid)
    assert "Line 2 has a PatientID that several patients share" in str(error)


def test_the_label_of_a_duplicate_still_counts(tmp_path: Path) -> None:
    labels = _read(tmp_path, "SOPInstanceUID,finding\ni1,normal\ni2,normal\n")
    twins = [_image("i1", "a"), _image("i2", "a", duplicate=True)]
    assert _joined(labels, twins) == ([0, 0], [])
    only = _read(tmp_path, "SOPInstanceUID,finding\ni2,mass\n")
    assert _joined(only, twins) == ([2, 2], [])
    clash = _read(tmp_path, "SOPInstanceUID,finding\ni1,normal\ni2,mass\n")
    assert isinstance(join(clash, twins)[1][0], LabelsInvalid)


def test_all_join_faults_at_once(tmp_path: Path) -> None:
    labels = _read(tmp_path, "SOPInstanceUID,finding\ni1,normal\ni2,mass\ni9,mass\n")
    images = [_image("i1", "a"), _image("i2", "a"), _image("i3", "b")]
    codes = [error.code for error in join(labels, images)[1]]
    assert codes == [LabelsInvalid.code, LabelMissing.code, LabelWithoutImage.code]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(("PatientID,finding\n" + text).encode("utf-8", "surrogatepass"))
    try:
        labels = read_labels(path, TASK)
    except LabelsInvalid:
        return
    assert all(key and label.value in (0, 1, 2) for key, label in labels.rows.items())


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1).map(
            composed
        ),
        st.sampled_from(TASK.classes),
        max_size=8,
    )
)
def test_what_csv_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, str]
) -> None:
    import csv

    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("PatientID", "finding"), *rows.items()])
    found = read_labels(path, TASK).rows
    assert {key: TASK.classes[label.value] for (_, key), label in found.items()} == rows
