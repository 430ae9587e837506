"""`cloister client freeze`, `quarantine` and `data-report`, and what they leave on the disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data.loading import load_frozen
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import CloisterError, OptionInvalid
from cloister_fl.study.file import load_study
from support.dicom import make_dicom, radiograph, write_dicom
from support.errors import raises
from support.studies import study_text

pytestmark = pytest.mark.process


CANARY, MRN, BORN = "CANARYNAME", "90210777", "19440402"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    data = tmp_path / "data" / CANARY
    about = {
        "PatientName": f"{CANARY}^A", "PatientBirthDate": BORN, "AccessionNumber": f"{CANARY}ACC",
        "InstitutionName": CANARY, "StudyDescription": CANARY, "Manufacturer": CANARY,
    }  # fmt: skip
    lines = ["PatientID,finding"]
    for number in range(4):
        write_dicom(
            data / f"{CANARY}{number}.dcm", radiograph(number), bits_stored=12,
            patient_id=f"{MRN}{number}", elements=about,
        )  # fmt: skip
        lines.append(f"{MRN}{number},{'nodule' if number % 2 else 'normal'}")
    (data / f"{CANARY}-held").write_bytes(
        make_dicom(
            radiograph(9), bits_stored=12, patient_id=f"{MRN}1",
            elements={**about, "BurnedInAnnotation": "YES"},
        )
    )  # fmt: skip
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "study.toml").write_text(study_text())
    site = init_site(
        tmp_path / "site", name="north", dicom=tmp_path / "data",
        labels=tmp_path / "data" / "labels.csv",
        policy=Policy(patients_at_most=9, min_patients=1),
    )  # fmt: skip
    # All four have one name and birth date, and are four patients.
    file = site.root / "site.toml"
    file.write_text(file.read_text().replace('names = "ask"', 'names = "different"'))
    return open_site(site.root)


def _run(site: Site, *words: str) -> str:
    result = CliRunner().invoke(client_group.app, [*words, "--dir", str(site.root)])
    if isinstance(result.exception, CloisterError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_freeze_then_again_with_a_reason(site: Site, tmp_path: Path) -> None:
    study = str(tmp_path / "study.toml")
    told = _run(site, "freeze", study)
    assert "Frozen at north: s, " in told
    assert "4 images of 4 patients." in told
    with raises(OptionInvalid, match="frozen already"):
        _run(site, "freeze", study)
    assert "4 images" in _run(site, "freeze", study, "--again", "--why", "sent again", "--yes")


def test_json_names_all_images_and_rows_and_find_takes_their_ids(
    site: Site, tmp_path: Path
) -> None:
    """Three images lose their rows, and thirty rows have no image: a message lists the first."""
    study = tmp_path / "study.toml"
    rows = site.labels.read_text().splitlines()
    extra = [f"none{number},normal" for number in range(30)]
    site.labels.write_text("\n".join([*rows[:2], *extra]))
    result = CliRunner().invoke(
        client_group.app, ["freeze", str(study), "--json", "--dir", str(site.root)]
    )
    assert isinstance(result.exception, CloisterError)
    told = json.loads(result.stdout)
    assert told["frozen"] is False
    missing, unused = told["faults"]
    assert (missing["code"], unused["code"]) == ("CLO-201", "CLO-202")
    assert unused["rows"] == [{"line": line, "key": "PatientID"} for line in range(3, 33)]
    assert len({one["image"] for one in missing["images"]}) == 3
    check = CliRunner().invoke(
        client_group.app,
        ["check", "--offline", "--json", "--study", str(study), "--dir", str(site.root)],
    )
    assert json.loads(check.stdout)["faults"][:2] == told["faults"]
    assert MRN not in result.stdout + check.stdout
    # As a message lists them: with commas; images and patients alike.
    (first, second, third) = missing["images"]
    asked = [f"{first['image']},", f"{second['patient']},", third["image"], "f" * 12]
    found = json.loads(_run(site, "find", *asked, "--study", str(study), "--json"))
    assert {one["patient_id"] for one in found["found"]} == {f"{MRN}{n}" for n in (1, 2, 3)}
    assert found["not_found"] == ["f" * 12]
    assert [first["image"]] in [one["asked"] for one in found["found"]]


def test_json_of_what_was_frozen_says_what_was_left_out(site: Site, tmp_path: Path) -> None:
    file = site.root / "site.toml"
    text = file.read_text().replace('on_mismatch = "refuse"', 'on_mismatch = "leave out"')
    file.write_text(text.replace("left_out_at_most = 5.0", "left_out_at_most = 50.0"))
    site.labels.write_text(site.labels.read_text().replace(f"{MRN}3,nodule", f"{MRN}3,else"))
    told = json.loads(_run(site, "freeze", str(tmp_path / "study.toml"), "--json"))
    assert (told["frozen"], told["images"], told["patients"]) == (True, 3, 3)
    wrong, missing = told["left_out"]
    assert (wrong["code"], wrong["rows"]) == ("CLO-206", [{"line": 5, "key": None}])
    assert (missing["code"], len(missing["images"])) == ("CLO-201", 1)


def test_the_way_of_a_held_file(site: Site, tmp_path: Path) -> None:
    (one,) = json.loads(_run(site, "quarantine", "--json"))["held"]
    assert (one["code"], one["state"]) == ("CLO-223", "waiting")
    name = one["id"]
    assert f"{name}  waiting   CLO-223" in _run(site, "quarantine")
    png = tmp_path / "look.png"
    told = _run(site, "quarantine", "show", name, "--png", str(png))
    assert f"{CANARY}-held" in told
    assert png.stat().st_mode & 0o777 == 0o600
    with Image.open(png) as image:
        assert image.size == (512, 512)
    told = _run(site, "quarantine", "release", name, "--why", "no name", "--yes")
    assert told.splitlines()[-1] == f"Released at north: {name}."
    assert len(load_frozen(site, load_study(tmp_path / "study.toml")).images) == 5
    assert "Kept" in _run(site, "quarantine", "keep", name, "--why", "a name after all", "--yes")
    with raises(OptionInvalid, match="No quarantined file"):
        _run(site, "quarantine", "release", "0" * 12, "--why", "x")


def test_the_report_is_written(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "report"
    told = _run(site, "data-report", "--study", str(tmp_path / "study.toml"), "--out", str(out))
    assert "Quarantined files: 1;" in told
    # All four are one person, by name and date of birth.
    assert "that may be one patient: 1;" in told
    assert json.loads((out / "data-report.json").read_text())["images"] == 4


@pytest.mark.usefixtures("silenced")
def test_the_site_folder_holds_no_name_and_no_plain_pixel(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = load_study(tmp_path / "study.toml")
    with caplog.at_level(logging.DEBUG):
        said = _run(site, "quarantine") + _run(site, "freeze", str(tmp_path / "study.toml"))
        name = json.loads(_run(site, "quarantine", "--json"))["held"][0]["id"]
        said += _run(site, "quarantine", "release", name, "--why", "no name", "--yes")
        said += _run(site, "check", "--offline", "--study", str(tmp_path / "study.toml"))
        cohort = load_frozen(site, study)
        shutil.copy(tmp_path / "data" / CANARY / f"{CANARY}0.dcm", tmp_path / "data" / "x.dcm")
        said += _run(site, "check", "--offline", "--study", str(tmp_path / "study.toml"))
    files = [path for path in site.root.rglob("*") if path.is_file()]
    kinds = {path.relative_to(site.root).parts[0] for path in files}
    assert {"cache", "audit", "manifests", "index.sqlite", "quarantine.json"} <= kinds
    held = b"".join(path.read_bytes() + b"\n" + os.fsencode(path.name) for path in files)
    held += said.encode() + caplog.text.encode()
    for needle in (CANARY, MRN, BORN, "nodule,"):
        assert needle.encode() not in held
        assert needle.encode("utf-16-le") not in held
    for image in cohort.images:
        for row in image[8:24:8]:
            assert row.astype("<u2").tobytes() not in held
    for number in range(4):
        for row in radiograph(number)[8:40:8]:
            assert row.astype("<u2").tobytes() not in held
