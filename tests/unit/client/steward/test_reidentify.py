"""A steward finds whom a pseudonym stands for, and which files were turned away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.preflight.data_check import inspect
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.data_report import survey
from cloister_fl.errors import LabelMissing, OptionInvalid
from support import studies
from support.dicom import make_dicom, radiograph, write_site
from support.errors import is_of

pytestmark = pytest.mark.process


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_site(tmp_path, 4, 2, key="PatientID")
    made = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    (made.dicom / "broken\x1b[8m.dcm").write_bytes(b"no image" * 50)
    (tmp_path / "study.toml").write_text(studies.study_text())
    return made


def _told(site: Site, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(client_group.app, ["find", *arguments, "--dir", str(site.root)])
    error = result.exception
    return result.exit_code, result.stdout, "" if error is None else str(error)


def test_a_code_names_the_files_that_were_turned_away_for_it(site: Site) -> None:
    (code,) = [one.value for one in inspect(site, None).rejects]
    status, told, _ = _told(site, code.lower())
    assert status == 0
    first, second = told.splitlines()
    assert code in first
    assert second.strip() == f"{site.dicom}/broken\\x1b[8m.dcm"


def test_a_pseudonym_of_a_message_names_its_patient(site: Site) -> None:
    study = studies.study()
    rows = site.labels.read_text().splitlines()
    (lost,) = [row for row in rows if row.startswith("MRN00002,")] or [rows[2]]
    site.labels.write_text("\n".join(row for row in rows if row != lost) + "\n")
    (fault, *_) = read_cohort(site, study).faults
    assert is_of(fault, LabelMissing)
    name = next(word for word in str(fault).replace(".", " ").split() if len(word) == 12
                and set(word) <= set("0123456789abcdef"))  # fmt: skip
    status, told, _ = _told(site, name, "--study", str(site.root / "study.toml"), "--json")
    assert status == 0
    found = json.loads(told)["found"]
    assert {one["patient_id"] for one in found} == {lost.split(",")[0]}
    assert len(found) == 2
    assert all(Path(one["path"]).is_file() for one in found)
    # Pseudonyms hold for one study.
    status, told, error = _told(site, name)
    assert (status, told) == (1, "")
    assert lost.split(",")[0] not in error


def test_a_report_s_pseudonyms_are_found_without_a_study(site: Site) -> None:
    twin = make_dicom(radiograph(70), bits_stored=12, patient_id="MRN77777")
    other = make_dicom(radiograph(70), bits_stored=12, patient_id="MRN88888")
    (site.dicom / "x.dcm").write_bytes(twin)
    (site.dicom / "y.dcm").write_bytes(other)
    ((one, two),) = survey(site, None).same_pixels
    found = {_told(site, name[:12])[1].split("PatientID ")[1].split()[0] for name in (one, two)}
    assert found == {"MRN77777", "MRN88888"}


@pytest.mark.parametrize("what", ["CLO-999", "MRN00001", "abc", "", "f" * 12])
def test_what_stands_for_nothing_is_told(site: Site, what: str) -> None:
    result = CliRunner().invoke(client_group.app, ["find", what, "--dir", str(site.root)])
    assert is_of(result.exception, OptionInvalid)
    assert not result.stdout
