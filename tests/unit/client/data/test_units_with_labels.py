"""Labels of examinations and images: which row holds, what is refused, and what a run is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.data.cohort import Unit, split, split_apart
from cloister_fl.client.data.frozen_dataset import labels_of
from cloister_fl.client.data.labels.label_file import Key, Label, Labels, read_labels
from cloister_fl.client.data.labels.row_matching import Linked, join
from cloister_fl.client.data.loading import freeze, load_cohort, load_for_run, read_for_check
from cloister_fl.client.dicom.folder_reader import Keys
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import LabelMissing, LabelsAmbiguous
from cloister_fl.tasks import Unit as UnitName
from cloister_fl.tasks.classification import Classification
from support import studies
from support.ct_series import phantom, write_series
from support.dicom import radiograph, uid, write_dicom
from support.errors import is_of, raises

SOP, ACCESSION, STUDY, PATIENT = (
    "SOPInstanceUID",
    "AccessionNumber",
    "StudyInstanceUID",
    "PatientID",
)


def _image(name: str, patient: str = "P", accession: str = "", study: str = "") -> Linked:
    return Linked(Keys(name, accession, patient, "", study), f"of-{patient}", name=name)


def _rows(*rows: tuple[str, str, int]) -> Labels:
    held: dict[Key, Label] = {
        (column, key): Label(line, value) for line, (column, key, value) in enumerate(rows, start=2)
    }
    return Labels(held)


IMAGES = [
    _image("1.1", accession="A", study="9.1"), _image("1.2", accession="A", study="9.1"),
    _image("2.1", accession="B", study="9.2"), _image("3.1", study="9.3"),
]  # fmt: skip
"""Three examinations of one patient; the third has no Accession Number."""


def _joined(unit: UnitName, *rows: tuple[str, str, int]) -> tuple[list[object], list[str]]:
    found, errors = join(_rows(*rows), IMAGES, unit=unit)
    return [label and label.value for label in found], [error.code for error in errors]


def test_examinations_of_one_patient_have_labels_of_their_own() -> None:
    rows = (ACCESSION, "A", 1), (STUDY, "9.2", 0), (STUDY, "9.3", 1)
    assert _joined("examination", *rows) == ([1, 1, 0, 1], [])
    # The same rows of a study of patients contradict each other.
    assert _joined("patient", *rows)[1] == ["CLO-206"]


def test_a_row_of_the_patient_is_for_examinations_without_a_row() -> None:
    assert _joined("examination", (ACCESSION, "A", 1), (PATIENT, "P", 0)) == ([1, 1, 0, 0], [])
    assert _joined("image", (ACCESSION, "A", 1), (PATIENT, "P", 0)) == ([1, 1, 0, 0], [])


def test_a_row_of_an_image_holds_where_images_are_labelled() -> None:
    rows = (SOP, "1.1", 1), (ACCESSION, "A", 0), (PATIENT, "P", 0)
    assert _joined("image", *rows) == ([1, 0, 0, 0], [])


@pytest.mark.parametrize(
    "rows",
    [
        [(SOP, "1.1", 1), (ACCESSION, "A", 0)],
        [(SOP, "1.1", 1), (SOP, "1.2", 0)],
        [(ACCESSION, "A", 1), (STUDY, "9.1", 0)],
        # The other image has the patient's row alone: half an examination.
        [(SOP, "1.1", 1)],
    ],
    ids=["image and examination", "two images", "two numbers", "half"],
)
def test_an_image_whose_examination_is_labelled_differently_is_refused(
    rows: list[tuple[str, str, int]],
) -> None:
    all_rows = [*rows, (PATIENT, "P", 0)]
    labels = _rows(*all_rows)
    found, (error,) = join(labels, IMAGES, unit="examination")
    assert is_of(error, LabelsAmbiguous)
    assert error.images == (("1.1", "of-P"), ("1.2", "of-P"))
    assert {line for line, _ in error.rows} >= {2}
    assert "give one examination two labels" in str(error)
    # Alone: that examination has none, and the patient's others keep theirs.
    found, _ = join(labels, IMAGES, unit="examination", alone=True)
    assert [label and label.value for label in found] == [None, None, 0, 0]


def test_rows_of_one_breadth_that_contradict_are_refused_for_an_image_too() -> None:
    assert _joined("image", (ACCESSION, "A", 1), (STUDY, "9.1", 0), (PATIENT, "P", 0))[1] == [
        "CLO-257"
    ]


def test_an_examination_is_one_patient_s() -> None:
    """Two patients with one Accession Number are told, and neither decides about the other."""
    images = [_image("1.1", "P", "A"), _image("5.1", "Q", "A")]
    labels = _rows((ACCESSION, "A", 1), (SOP, "5.1", 0))
    found, errors = join(labels, images, unit="examination", alone=True)
    assert [label and label.value for label in found] == [1, None]
    assert [error.code for error in errors] == ["CLO-206", "CLO-257"]
    alone, _ = join(labels, images[:1], unit="examination", alone=True)
    assert alone == found[:1]


@pytest.mark.parametrize(
    ("unit", "column"), [("patient", PATIENT), ("examination", STUDY), ("image", STUDY)]
)
def test_a_table_of_patients_may_name_the_study_beside(
    tmp_path: Path, unit: UnitName, column: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("StudyInstanceUID,PatientID,finding\n9.1,P,yes\n,Q,no\n9.3,,no\n")
    rows = read_labels(path, Classification("finding", ("no", "yes"), unit)).rows
    first = "P" if column == PATIENT else "9.1"
    assert list(rows) == [(column, first), (PATIENT, "Q"), (STUDY, "9.3")]


# A site

EXAMINATIONS = studies.study(target={"unit": "examination"})
OPEN = studies.study(target={"unit": "examination"}, privacy={"enabled": False})
FIRST = {0: (1, 0), 1: (0,), 2: (1, 1), 3: (0, 0, 1)}
"""Classes of the examinations of the patients that a site begins with; two images each."""


def _site(root: Path, classes: dict[int, tuple[int, ...]] = FIRST, **policy: int) -> Site:
    rows = ["AccessionNumber,finding"]
    for patient, labels in classes.items():
        for number, label in enumerate(labels):
            accession = f"A{patient}-{number}"
            rows.append(f"{accession},{('normal', 'nodule')[label]}")
            for image in range(2):
                write_dicom(
                    root / "dicom" / f"{accession}-{image}.dcm",
                    radiograph(100 * patient + 10 * number + image),
                    bits_stored=12,
                    patient_id=f"MRN{patient}",
                    elements={"AccessionNumber": accession},
                )
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    allowed = {
        "min_patients": 1, "patients_at_most": 99, "min_patients_per_class_without_privacy": 1,
        **policy,
    }  # fmt: skip
    return init_site(
        root,
        name="north",
        policy=Policy(**allowed, allow_without_privacy=True),  # type: ignore[arg-type]
    )


def _classes(cohort: object) -> dict[tuple[int, ...], int]:
    found: dict[tuple[int, ...], int] = {}
    for patient in cohort.patients:  # type: ignore[attr-defined]
        each = tuple(sorted(unit.label for unit in patient.units))
        found[each] = found.get(each, 0) + 1
        for unit in patient.units:
            assert len(unit.images) == 2
            targets = cohort.targets[list(unit.images)]  # type: ignore[attr-defined]
            assert targets.tolist() == [unit.label] * 2
        assert sorted(i for unit in patient.units for i in unit.images) == sorted(patient.images)
    return found


@pytest.mark.process
def test_labels_are_frozen_by_examination_and_a_run_takes_them(tmp_path: Path) -> None:
    site = _site(tmp_path)
    report = inspect(site, EXAMINATIONS)
    assert (report.faults, report.labels) == ((), {"normal": 4, "nodule": 4})
    assert "labels      normal 4, nodule 4 (examinations)" in render(report)
    frozen = freeze(site, EXAMINATIONS)
    assert len(frozen.items) == 16
    expected = {(0, 1): 1, (0,): 1, (1, 1): 1, (0, 0, 1): 1}
    assert _classes(load_for_run(site, EXAMINATIONS)) == expected
    # What the file says later is told, and changes nothing of a run.
    site.labels.write_text(site.labels.read_text().replace("A0-0,nodule", "A0-0,normal"))
    assert read_for_check(site, EXAMINATIONS).faults[0].code == "CLO-209"
    assert _classes(load_for_run(site, EXAMINATIONS)) == expected
    # A study of patients has no use for such rows.
    assert read_for_check(site, studies.study()).faults[0].code == "CLO-206"


@pytest.mark.process
def test_a_patient_stays_whole_where_patients_are_divided(tmp_path: Path) -> None:
    cohort = load_cohort(_site(tmp_path), OPEN)
    for kept, apart in (split(cohort, 0.5), split_apart(cohort, 0.5)):
        names = [{one.pseudonym for one in side.patients} for side in (kept, apart)]
        assert not names[0] & names[1]
        assert len(names[0]) + len(names[1]) == 4
        both = {**_classes(kept)}
        for each, count in _classes(apart).items():
            both[each] = both.get(each, 0) + count
        assert both == _classes(cohort)
    # By the class that is named last, which three patients have.
    assert len(split(cohort, 0.34)[1].patients) == 1


@pytest.mark.process
def test_a_site_counts_patients_and_not_examinations(tmp_path: Path) -> None:
    """Of five examinations, two patients: what a policy asks for are patients."""
    site = _site(tmp_path, {0: (1, 0, 0), 1: (0, 1)}, min_patients=3)
    (fault,) = inspect(site, OPEN).faults
    assert "too few patients: 2." in str(fault)


@pytest.mark.process
def test_whoever_has_too_many_units_to_be_counted_is_told(tmp_path: Path) -> None:
    site = _site(tmp_path, {0: (0, 1) * 4 + (1,), 1: (0, 1)})
    told = "1 patient has more than 16 images"
    images = {"target": {"unit": "image"}}
    measured = studies.study(**images, evaluation={"release_epsilon": 1.0})
    assert any(told in one for one in inspect(site, measured).remarks)
    # Nobody is counted where nothing is released, and nine examinations are few enough.
    assert not any(told in one for one in inspect(site, studies.study(**images)).remarks)
    assert not any("more than 16" in one for one in inspect(site, OPEN).remarks)


@pytest.mark.process
def test_ambiguous_examinations_are_refused_or_left_out(tmp_path: Path) -> None:
    site = _site(tmp_path)
    instance = uid("instance", "MRN3", "x")
    path = site.dicom / "A3-0-0.dcm"
    write_dicom(path, radiograph(300), bits_stored=12, patient_id="MRN3",
                elements={"AccessionNumber": "A3-0", "SOPInstanceUID": instance})  # fmt: skip
    rows = site.labels.read_text().replace("AccessionNumber,", "SOPInstanceUID,AccessionNumber,")
    rows = "\n".join(
        f",{row}"
        if row.startswith("A3")
        or (row.startswith("A") and "," in row and not row.startswith("SOP"))
        else row
        for row in rows.splitlines()
    )
    site.labels.write_text(f"{rows}\n{instance},,nodule\n")
    with raises(LabelsAmbiguous, match="Lines 7 and 10 give one examination two labels"):
        freeze(site, EXAMINATIONS)
    told = json.dumps(inspect(site, EXAMINATIONS).as_dict())
    assert "MRN" not in told
    assert "A3-0" not in told
    file = site.root / "site.toml"
    text = file.read_text().replace('on_mismatch = "refuse"', 'on_mismatch = "leave out"')
    file.write_text(text.replace("left_out_at_most = 5.0", "left_out_at_most = 50.0"))
    site = open_site(site.root)
    assert len(freeze(site, EXAMINATIONS).items) == 14
    classes = _classes(load_for_run(site, EXAMINATIONS))
    assert classes == {(0, 1): 2, (0,): 1, (1, 1): 1}


@pytest.mark.process
def test_an_image_without_a_row_is_missing_one(tmp_path: Path) -> None:
    site = _site(tmp_path)
    text = site.labels.read_text().replace("A2-1,nodule\n", "")
    site.labels.write_text(text)
    (fault,) = read_for_check(site, EXAMINATIONS).faults
    assert is_of(fault, LabelMissing)
    assert len(fault.images) == 2


@pytest.mark.process
def test_volumes_of_two_examinations_of_a_patient(tmp_path: Path) -> None:
    """Each slice is frozen with the label of its own volume."""
    rows = ["AccessionNumber,finding"]
    for patient, labels in (("P1", (1, 0)), ("P2", (0,))):
        for number, label in enumerate(labels):
            accession = f"{patient}-{number}"
            rows.append(f"{accession},{('normal', 'nodule')[label]}")
            write_series(
                tmp_path / "dicom" / accession, np.roll(phantom(), number, axis=2),
                patient=patient, series=accession,
                change={k: {"AccessionNumber": accession} for k in range(9)},
            )  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    site = init_site(tmp_path, name="north", policy=Policy(patients_at_most=99, min_patients=1))
    asked = studies.study(
        input={"modalities": ["CT"], "dimensions": 3, "depth": 8, "spacing": 1.0, "size": 16},
        network={"name": "small-cnn-3d"},
        target={"unit": "examination"},
    )
    frozen = freeze(site, asked)
    assert len(frozen.items) == 27
    words = [cells[0] for cells in labels_of(site, frozen).values()]
    assert (words.count("nodule"), words.count("normal")) == (9, 18)
    cohort = load_for_run(site, asked)
    found = sorted(tuple(sorted(u.label for u in one.units)) for one in cohort.patients)
    assert found == [(0,), (0, 1)]
    assert sorted(cohort.targets.tolist()) == [0, 0, 1]


def test_units_of_a_patient_without_parts() -> None:
    from cloister_fl.client.data.cohort import Cohort, Patient

    one = Patient("a" * 64, 1, (0, 1))
    assert one.units == (Unit(1, (0, 1)),)
    assert Cohort(np.empty((0, 1, 1), np.uint16), (one,), {}, {}, {}).patients[0].parts == ()
