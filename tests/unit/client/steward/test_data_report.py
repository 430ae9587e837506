"""The steward's report: counts that add up, patients who are there twice, and nothing loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.data_report import HTML, JSON, survey, write
from cloister_fl.errors import Reject
from support import studies
from support.dicom import make_dicom, radiograph, write_dicom, write_site

pytestmark = pytest.mark.process


STUDY = studies.study()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    root = tmp_path / "site"
    root.mkdir()
    write_site(root, 4, 2, key="PatientID")
    site = init_site(root, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))
    about = {"StudyDate": "20190304", "Manufacturer": "<script>alert(1)</script>"}
    about |= {"PatientSex": "F", "PatientAge": "081Y"}
    person = {"PatientName": "Doe^Jane", "PatientBirthDate": "19700101"}
    for number, patient in enumerate(("A", "B")):
        write_dicom(
            site.dicom / f"person{patient}.dcm",
            radiograph(80 + number, 60, 50),
            bits_stored=12,
            patient_id=f"MRN-{patient}",
            elements={**about, **person},
        )
    for patient in ("C", "D"):
        write_dicom(
            site.dicom / f"pixels{patient}.dcm",
            radiograph(90),
            bits_stored=12,
            patient_id=f"MRN-{patient}",
            elements={"PatientName": f"Other^{patient}", "PatientBirthDate": "19700101"},
        )
    (site.dicom / "held").write_bytes(make_dicom(elements={"BurnedInAnnotation": "YES"}))
    (site.dicom / "note.txt").write_text("no DICOM")
    with site.labels.open("a") as file:
        file.writelines(f"MRN-{patient},nodule\n" for patient in "ABCD")
    return site


def test_counts_and_leaks(site: Site) -> None:
    report = survey(site, STUDY)
    assert not report.faults
    assert (report.files, report.images, report.patients, report.held) == (14, 12, 8, 1)
    assert report.rejects == {Reject.NOT_DICOM: 1, Reject.BURNED_IN: 1}
    assert report.tables["Modality"] == {"DX": 12}
    assert report.tables["Year"] == {"not told": 10, "2019": 2}
    assert list(report.tables["Year"]) == ["2019", "not told"]  # by year, not by count
    assert report.tables["Sex"] == {"not told": 10, "F": 2}
    assert report.tables["Age"] == {"80+": 2, "not told": 10}
    assert list(report.tables["Age"]) == ["80+", "not told"]
    assert report.tables["Size"] == {"48 x 40": 10, "60 x 50": 2}
    assert report.tables["Images a patient"] == {"1": 4, "2": 4}
    assert report.tables["Class, patients"] == {"normal": 2, "nodule": 6}
    assert report.tables["Maker"]["<script>alert(1)</script>"] == 2

    def names(*patients: str) -> tuple[str, ...]:
        key = site.pseudonym_key()
        return tuple(sorted(pseudonym(key, STUDY.digest, "", f"MRN-{one}") for one in patients))

    assert report.same_person == (names("A", "B"),)
    assert report.same_pixels == (names("C", "D"),)


def test_without_a_study_labels_are_not_looked_at(site: Site) -> None:
    site.labels.unlink()
    report = survey(site, None)
    assert (report.study, report.images, report.faults) == (None, 12, ())
    assert "Class, patients" not in report.tables


def test_what_is_written(site: Site, tmp_path: Path) -> None:
    report = survey(site, STUDY)
    write(report, tmp_path / "out")
    for name in (HTML, JSON):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o600
    page = (tmp_path / "out" / HTML).read_text()
    told = json.loads((tmp_path / "out" / JSON).read_text())
    assert told == json.loads(json.dumps(report.as_dict()))
    assert told["tables"]["Size"] == {"48 x 40": 10, "60 x 50": 2}
    assert told["one_person_under_several_ids"] == [list(report.same_person[0])]
    for text in (page, json.dumps(told)):
        assert "MRN" not in text
        assert "Jane" not in text
    # Text of a file is data, and the page fetches nothing.
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/png)", page)
    assert "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == 1


def test_a_site_without_data_still_gets_a_report(tmp_path: Path) -> None:
    site = init_site(tmp_path / "empty", name="empty")
    site.dicom.mkdir()
    report = survey(site, STUDY)
    assert (report.images, report.faults[0].code) == (0, "CLO-203")
    write(report, tmp_path / "out")
    assert "CLO-203" in (tmp_path / "out" / HTML).read_text()
