"""The report on a site's data, the contact sheet, and what neither may hold."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.dicom.transfer_syntaxes import TRANSFER_SYNTAXES
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.contact_sheet import SHEET_TILE, contact_sheet
from cloister_fl.errors import CloisterError, DataError
from cloister_fl.study.schema import Study
from support import spending, studies
from support.dicom import make_dicom, radiograph, sample, write_dicom, write_site

pytestmark = pytest.mark.process


CANARY = "CANARYNAME"
MRN = "CANARYMRN77"


STUDY = studies.study(study={"name": "nodules"})


def _site(root: Path, patients: int = 6, images: int = 1) -> Site:
    write_site(root, patients, images)
    return init_site(root, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))


def test_report_of_sound_data(tmp_path: Path) -> None:
    site = _site(tmp_path, 6, 2)
    write_dicom(site.dicom / "us", elements={"Modality": "US"})
    report = inspect(site, STUDY)
    assert report.as_dict() == {
        "site": "north",
        "study": "nodules",
        "usable": True,
        "would_take_part": True,
        "epsilon_study": 0.0,
        "epsilon_promised": 0.0,
        "epsilon_lifetime": 8.0,
        "files": 13,
        "accepted": 12,
        "patients": 6,
        "images_per_patient": {"2": 6},
        "labels": {"normal": 3, "nodule": 3},
        "unit": "patient",
        "modalities": {"DX": 12},
        "marked_too_small": 0,
        "patients_file_lines_without_image": [],
        "remarks": ["No registry of ledgers is kept on this machine: CLOISTER_STATE."],
        "sizes": {"48x40": 12},
        "rejects": [
            {"code": "CLO-215", "reason": "modality not asked for by the study", "count": 1}
        ],
        "faults": [],
        "left_out": [],
        "policy": [],
    }
    text = render(report)
    for words in (
        "Site north, study nodules",
        "images      12 (DX 12)",
        "6 patients with 2 images",
        "normal 3, nodule 3 (patients)",
        "1  CLO-215  modality not asked for",
        "The data can be used.",
    ):
        assert words in text


def test_report_without_a_study(tmp_path: Path) -> None:
    site = _site(tmp_path)
    write_dicom(site.dicom / "ct", modality="CT")
    site.labels.unlink()
    report = inspect(site, None)
    assert report.modalities == {"CT": 1, "DX": 6}
    assert report.labels == {}
    assert report.faults == ()
    assert "Labels were not checked" in render(report)


def _codes(site: Site, study: Study = STUDY) -> list[str]:
    report = inspect(site, study)
    assert [fault["code"] for fault in report.as_dict()["faults"]] == [
        fault.code for fault in report.faults
    ]
    text = render(report)
    assert all(str(fault) in text for fault in report.faults)
    assert ("The data can be used." in text) == (not report.faults)
    return [fault.code for fault in report.faults]


def test_all_faults_are_listed(tmp_path: Path) -> None:
    site = _site(tmp_path)
    lines = site.labels.read_text().splitlines()
    site.labels.write_text("\n".join([*lines[:-1], "1.2.3,nodule"]) + "\n")
    assert _codes(site) == ["CLO-201", "CLO-202"]
    # A patient without a label counts as none, and not as the first.
    assert sum(inspect(site, STUDY).labels.values()) == 5
    site.labels.write_text("\n".join([*lines, "1.2.3,what"]) + "\n")
    assert _codes(site) == ["CLO-206"]
    site.labels.write_text("\n".join(lines).replace("nodule", "normal") + "\n")
    # A hospital with one class is ordinary, unless its policy says otherwise.
    assert _codes(site) == []
    policy = Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=1)
    each = init_site(tmp_path / "each", dicom=site.dicom, labels=site.labels, policy=policy)
    assert _codes(each) == ["CLO-204"]
    site.labels.write_text("\n".join(lines) + "\n")
    strict = init_site(
        tmp_path / "strict",
        dicom=site.dicom,
        labels=site.labels,
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=4),
    )
    assert _codes(strict) == ["CLO-207"]


def test_empty_and_unreadable_sites(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    assert _codes(site) == ["CLO-205", "CLO-206"]
    assert inspect(site, STUDY).files == 0
    site.dicom.mkdir()
    assert _codes(site) == ["CLO-203", "CLO-206"]
    site.labels.write_text("PatientID,finding\nP1,normal\n")
    assert _codes(site) == ["CLO-203"]


def test_policy_is_told(tmp_path: Path) -> None:
    report = inspect(_site(tmp_path), studies.study(privacy={"epsilon": 99.0}))
    assert len(report.policy) == 1
    assert "policy.max_epsilon_study" in render(report)
    assert report.faults == ()


def test_many_sizes_are_summed_up(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    for number in range(9):
        write_dicom(
            site.dicom / str(number),
            radiograph(number, rows=40 + number),
            bits_stored=12,
            patient_id=f"P{number}",
        )
    text = render(inspect(site, None))
    assert "others (3)" in text


def test_contact_sheet(tmp_path: Path) -> None:
    cohort = load_cohort(_site(tmp_path / "site", 10, 2), STUDY)
    shown, png = contact_sheet(cohort, None)
    assert shown == 10
    with Image.open(io.BytesIO(png)) as sheet:
        assert sheet.size == (8 * SHEET_TILE, 2 * SHEET_TILE)
        assert sheet.mode == "L"
        assert sheet.info == {}
        pixels = np.asarray(sheet)
    first = cohort.images[cohort.patients[0].images[0]] >> 8
    assert np.array_equal(
        pixels[: SHEET_TILE : SHEET_TILE // 32, : SHEET_TILE : SHEET_TILE // 32], first
    )
    assert pixels[SHEET_TILE:, 2 * SHEET_TILE :].max() == 0


def test_contact_sheet_shows_at_most_48(tmp_path: Path) -> None:
    cohort = load_cohort(_site(tmp_path / "site", 50), STUDY)
    assert contact_sheet(cohort, None)[0] == 48


def _canary_elements() -> dict[str, object]:
    return {
        "PatientName": f"{CANARY}^A",
        "PatientID": MRN,
        "IssuerOfPatientID": f"{CANARY}-ISSUER",
        "AccessionNumber": f"{CANARY}ACC",
        "PatientBirthDate": "19700101",
        "InstitutionName": CANARY,
        "ReferringPhysicianName": CANARY,
        "StudyDescription": CANARY,
        "ImageComments": CANARY,
        "StudyInstanceUID": "1.2.777777",
        "WindowCenter": "100",
        "WindowWidth": "50",
    }


def _plant(root: Path) -> Site:
    """A site whose folder, headers and labels are full of names, good files and bad."""
    site = init_site(root, name="north")
    folder = site.dicom / CANARY / MRN
    for number, syntax in enumerate(sorted(TRANSFER_SYNTAXES)):
        pixels, bits = sample(syntax, number)
        data = make_dicom(
            pixels, bits_stored=bits, transfer_syntax=syntax, elements=_canary_elements()
        )
        (folder).mkdir(parents=True, exist_ok=True)
        (folder / f"{CANARY}{number}.dcm").write_bytes(data)
        for cut in (200, len(data) // 2, len(data) - 30):
            (folder / f"{CANARY}{number}-{cut}").write_bytes(data[:cut])
        damaged = bytearray(data)
        damaged[-60:-20] = bytes(40)
        (folder / f"{CANARY}{number}-x").write_bytes(damaged)
    for number, (keyword, value) in enumerate(
        {
            "RescaleSlope": f"{MRN}",
            "WindowCenter": f"{MRN}",
            "Modality": CANARY,
            "PhotometricInterpretation": CANARY,
            "BitsStored": 99,
            "SOPInstanceUID": f"{CANARY}.1",
            "SpecificCharacterSet": CANARY,
            "NumberOfFrames": "7",
        }.items()
    ):
        # DS and IS refuse text when they are built, so it is put in afterwards.
        text = isinstance(value, str) and keyword in ("RescaleSlope", "WindowCenter")
        data = make_dicom(
            radiograph(100 + number),
            bits_stored=12,
            elements={**_canary_elements(), keyword: "12345678901" if text else value},
        )
        (folder / f"bad{number}").write_bytes(data.replace(b"12345678901", MRN.encode()))
    site.labels.write_text(
        f"SOPInstanceUID,finding,note\n{MRN},{CANARY},{CANARY}\n{CANARY},normal,{MRN}\n"
    )
    return site


@pytest.mark.usefixtures("silenced")
@pytest.mark.parametrize("labels", ["faulty", "sound"])
def test_the_canary_is_nowhere(
    tmp_path: Path,
    labels: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    site = _plant(tmp_path / "root")
    if labels == "sound":
        site.labels.write_text(f"PatientID,finding\n{MRN},normal\n")
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            report = inspect(site, STUDY)
            assert report.accepted >= 10
            assert report.faults
            said += [render(report), json.dumps(report.as_dict()), repr(report)]
            said += [repr(fault) for fault in report.faults]
        try:
            load_cohort(site, STUDY)
        except DataError as error:
            said += [str(error), repr(error), repr(error.__cause__)]
        assert report.cohort is not None
        said += [repr(report.cohort), repr(report.cohort.patients)]
        (tmp_path / "sheet.png").write_bytes(contact_sheet(report.cohort, None)[1])
    said += [caplog.text, *capfd.readouterr()]
    written = [path.read_bytes() for path in site.cache.iterdir()]
    written.append((tmp_path / "sheet.png").read_bytes())
    names = [os.fsencode(path.name) for path in site.cache.iterdir()]
    assert len(written) > 10
    haystack = "\n".join(said).encode() + b"".join(written) + b"\n".join(names)
    for needle in (CANARY, MRN, "777777", "19700101", str(site.dicom)):
        assert needle.encode() not in haystack
        assert needle.encode("utf-16-le") not in haystack


def test_pydicom_would_have_said_it(tmp_path: Path) -> None:
    """The plant works: read the usual way, the same files do quote the canary."""
    import warnings

    import pydicom

    site = _plant(tmp_path)
    heard = ""
    for path in sorted(site.dicom.rglob("bad*")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                heard += str(pydicom.dcmread(path))
            except (ValueError, LookupError, CloisterError) as error:
                heard += str(error)
            heard += "".join(str(one.message) for one in caught)
    assert CANARY in heard
    assert MRN in heard


def test_a_study_that_the_budget_cannot_bear_is_told_here_already(tmp_path: Path) -> None:
    from cloister_fl.client.site.folder import init_site
    from cloister_fl.client.site.policy import Policy
    from support.federations import approve, study, write_cohort

    write_cohort(tmp_path / "north", np.random.default_rng(1), "N")
    site = init_site(
        tmp_path / "north",
        policy=Policy(patients_at_most=1_000, max_epsilon_study=3, max_epsilon_lifetime=4),
    )
    asked = study(privacy="epsilon = 3")
    approve(site.root, asked)
    fresh = inspect(site, asked)
    assert fresh.policy == ()
    words = "promised so far, patient-level, this study: {:.2f}; lifetime on this data: {:.2f} of 4"
    assert words.format(0, 0) in render(fresh)
    assert "promised so far, patient-level, lifetime on this data: 0.00 of 4" in render(
        inspect(site, None)
    )
    spending.admit(site, asked, run="one", invited=5)
    # A run that has trained nothing gives its place to the next.
    assert inspect(site, asked).policy == ()
    spending.charge(site, asked, run="one", round_number=1)
    spent = inspect(site, asked)
    (told,) = spent.policy
    assert "This study was run at this site before" in told
    assert "would not take part" in render(spent)
    assert spent.as_dict()["would_take_part"] is False
    assert spent.as_dict()["epsilon_promised"] > 2.9
    told_study, told_lifetime = spent.promised_study, spent.promised
    assert 0 < told_study < told_lifetime
    assert words.format(told_study, told_lifetime) in render(spent)
