"""A person with two numbers at a site: reported, decided, frozen, and never a reason to refuse."""

from __future__ import annotations

import csv
import io
import json
import stat
from pathlib import Path

import pydicom
import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data.loading import freeze, load_frozen, read_cohort
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.audit_log import entries_of, path_of
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import reidentify
from cloister_fl.errors import DataChanged, PatientsUndecided
from support import studies
from support.dicom import make_dicom, radiograph, wide, write_dicom, write_site
from support.errors import raises

pytestmark = pytest.mark.process

STUDY = studies.study()
CANARY = "CANARY7"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Four patients, one of whom has a second image under the same number and an issuer."""
    root = write_site(tmp_path / "data", 4, key="PatientID")
    for number, (patient, elements) in enumerate(
        ((CANARY, {}), (CANARY, {"IssuerOfPatientID": "CANARYHOSP"}))
    ):
        write_dicom(
            root / "dicom" / f"x{number}.dcm",
            radiograph(50 + number),
            bits_stored=12,
            patient_id=patient,
            elements=elements,
        )
    with (root / "labels.csv").open("a") as labels:
        labels.write(f"{wide(CANARY)},nodule\n")
    return init_site(
        tmp_path / "north",
        name="north",
        dicom=root / "dicom",
        labels=root / "labels.csv",
        policy=Policy(patients_at_most=1_000, min_patients=1),
    )


def _decide(site: Site, rows: str = "", **settings: str) -> Site:
    path = site.root / "site.toml"
    lines = path.read_text().splitlines()
    for key, value in settings.items():
        (place,) = [n for n, line in enumerate(lines) if line.startswith(f"{key} = ")]
        lines[place] = f'{key} = "{value}"'
    if rows:
        (site.root / "patients.csv").write_text(f"PatientID,IssuerOfPatientID,person\n{rows}")
        lines[lines.index('mapping = ""')] = 'mapping = "patients.csv"'
    path.write_text("\n".join(lines))
    return open_site(site.root)


def _by_accession(site: Site) -> Site:
    """Labels that name images and no patient, so that nothing else is wrong."""
    rows = ["SOPInstanceUID,finding"]
    for number, path in enumerate(sorted(site.dicom.rglob("*.dcm"))):
        instance = read_instance(path)
        rows.append(f"{instance},{'nodule' if number % 2 or path.name[0] == 'x' else 'normal'}")
    site.labels.write_text("\n".join(rows))
    return site


def read_instance(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)


def test_a_number_with_and_without_issuer_stops_check_and_freeze_and_no_run(site: Site) -> None:
    _by_accession(site)
    report = inspect(site, STUDY)
    assert [fault.code for fault in report.faults] == ["CLO-254"]
    assert report.patients == 6
    assert "CANARY" not in render(report, site.root)
    assert inspect(site, None).faults[0].code == "CLO-254"
    with raises(PatientsUndecided):
        freeze(site, STUDY)
    assert not manifests.is_frozen(site, STUDY)
    # A run is a message of the coordinator: what it gets for an answer depends on no such pair.
    assert len(load_frozen(site, STUDY).patients) == 6
    (entry,) = [one for one in entries_of(site) if one.kind == "frozen"]
    assert (entry.body["undecided"], entry.body["decided"], entry.body["mapped"]) == (1, "", 0)


@pytest.mark.parametrize(("decision", "patients"), [("same", 5), ("different", 6)])
def test_the_stewards_decision_holds_and_is_logged_and_frozen(
    site: Site, decision: str, patients: int
) -> None:
    _by_accession(site)
    decided = _decide(site, issuers=decision)
    assert inspect(decided, STUDY).faults == ()
    manifest = freeze(decided, STUDY)
    assert len({one.patient for one in manifest.items}) == patients
    (entry,) = [one for one in entries_of(site) if one.kind == "frozen"]
    assert entry.body["decided"] == f"issuers={decision}"
    assert entry.body["undecided"] == 0
    assert entry.body["patients"] == manifest.patients.digest
    for text in (manifests.path_of(site, STUDY).read_text(), path_of(site).read_text()):
        assert "CANARY" not in text
    # Decided anew after it was frozen: the study goes on with what it was frozen with.
    other = _decide(site, issuers="same" if decision == "different" else "different")
    assert "goes on with those" not in render(inspect(decided, STUDY))
    assert "frozen with other decisions on patients" in render(inspect(other, STUDY))
    names = {one.pseudonym for one in load_frozen(other, STUDY).patients}
    assert names == {one.patient for one in manifest.items}
    again = freeze(other, STUDY, again=True, why="decided anew")
    assert len({one.patient for one in again.items}) == 11 - patients


def test_the_decision_in_a_manifest_cannot_be_changed(site: Site) -> None:
    decided = _decide(_by_accession(site), issuers="same")
    freeze(decided, STUDY)
    path = manifests.path_of(decided, STUDY)
    path.write_text(path.read_text().replace('"issuers": "same"', '"issuers": "different"'))
    with raises(DataChanged, match="does not match this site's signature"):
        load_frozen(decided, STUDY)


def test_a_manifest_from_before_patients_were_told_apart_so_says_to_freeze_again(
    site: Site,
) -> None:
    decided = _decide(_by_accession(site), issuers="same")
    freeze(decided, STUDY)
    path = manifests.path_of(decided, STUDY)
    held = json.loads(path.read_text())
    held["body"]["version"] = 1
    path.write_text(json.dumps(held))
    with raises(DataChanged, match="keeps labels differently"):
        load_frozen(decided, STUDY)


def test_the_mapping_joins_two_numbers_and_a_labels_row_for_either_is_enough(site: Site) -> None:
    # The labels file has the number in full-width letters, and no issuer.
    decided = _decide(site, f"{CANARY},,one\n{CANARY},canaryhosp,one\n")
    report = inspect(decided, STUDY)
    assert report.faults == ()
    assert report.patients == 5
    assert report.labels == {"normal": 2, "nodule": 3}
    labels = site.labels.read_text().replace(wide(CANARY), "OTHER9")
    site.labels.write_text(labels)
    assert "CLO-201" in [fault.code for fault in inspect(decided, STUDY).faults]
    (site.root / "patients.csv").write_text(
        f"PatientID,IssuerOfPatientID,person\n{CANARY},,one\n{CANARY},canaryhosp,one\nOTHER9,,one\n"
    )
    report = inspect(decided, STUDY)
    assert report.faults == ()
    assert report.unused == (4,)
    assert "line 4 of the patients file" in render(report, site.root)


def test_one_image_under_two_numbers_of_a_person_is_a_duplicate(site: Site) -> None:
    write_dicom(
        site.dicom / "y.dcm", radiograph(50), bits_stored=12, patient_id="OTHER9",
        elements={"IssuerOfPatientID": "CANARYHOSP"},
    )  # fmt: skip
    apart = read_cohort(site, STUDY, require_labels=False)
    joined = _decide(site, f"{CANARY},,one\nOTHER9,CANARYHOSP,one\n")
    reading = read_cohort(joined, STUDY, require_labels=False)
    assert len(apart.items) == 7
    assert len(reading.items) == 6
    assert {one.value: n for one, n in reading.rejects.items()} == {"CLO-224": 1}


def test_who_a_pseudonym_stands_for_is_found_by_the_same_decisions(site: Site) -> None:
    decided = _decide(_by_accession(site), f"{CANARY},,one\n{CANARY},canaryhosp,one\n")
    manifest = freeze(decided, STUDY)
    (owner,) = {
        one.patient
        for one in manifest.items
        if sum(each.patient == one.patient for each in manifest.items) == 2
    }
    assert [one.patient for one in reidentify.find(decided, owner, STUDY)] == [CANARY, CANARY]
    # Also where the steward decided anew since.
    other = _decide(decided, issuers="different")
    (site.root / "patients.csv").write_text("PatientID,person\nP,x\n")
    assert len(reidentify.find(other, owner, STUDY)) == 2


def test_a_number_of_nothing_that_is_seen_is_no_number(site: Site) -> None:
    (site.dicom / "z.dcm").write_bytes(
        make_dicom(
            radiograph(80), bits_stored=12, patient_id="\u200b",
            elements={"SpecificCharacterSet": "ISO_IR 192"},
        )
    )  # fmt: skip
    reading = read_cohort(site, STUDY, require_labels=False)
    assert {one.value: n for one, n in reading.rejects.items()} == {"CLO-222": 1}


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192"])
def test_two_numbers_that_differ_behind_a_backslash_are_two_patients(
    site: Site, charset: str
) -> None:
    """DICOM separates values with it; of the first value alone, a whole hospital is one patient."""
    before = _patients(site)
    for number, name in enumerate(("RSNA\\001", "RSNA\\002", "RSNA")):
        (site.dicom / f"z{number}.dcm").write_bytes(
            make_dicom(
                radiograph(80 + number), bits_stored=12, patient_id=name,
                elements={"SpecificCharacterSet": charset},
            )
        )  # fmt: skip
    assert _patients(site) == before + 3


def test_a_number_that_its_character_set_does_not_decode_is_nobody_s(site: Site) -> None:
    """Two such numbers read alike, and would be one patient."""
    before = _patients(site)
    for number, name in enumerate(("M\xe411", "M\xf611")):
        whole = make_dicom(
            radiograph(80 + number), bits_stored=12, patient_id=name,
            elements={"SpecificCharacterSet": "ISO_IR 100"},
        )  # fmt: skip
        assert whole.count(b"ISO_IR 100") == 1
        (site.dicom / f"z{number}.dcm").write_bytes(whole.replace(b"ISO_IR 100", b"ISO_IR 192"))
    reading = read_cohort(site, STUDY, require_labels=False)
    assert {one.value: n for one, n in reading.rejects.items()} == {"CLO-222": 2}
    assert _patients(site) == before


def _patients(site: Site) -> int:
    cohort = read_cohort(site, STUDY, require_labels=False).cohort
    return 0 if cohort is None else len(cohort.patients)


def test_the_command_prints_counts_and_writes_the_numbers_for_their_owner_alone(
    site: Site, tmp_path: Path
) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(client_group.app, ["patients", *words, "--dir", str(site.root)])
        assert result.exit_code == 0, result.output
        assert "CANARY" not in result.output
        return result.output

    out = tmp_path / "found.csv"
    assert "1 set of patient numbers" in run()
    assert json.loads(run("--json")) == {
        "site": "north", "sets": 1, "patients": 2, "reasons": {"issuers": 1},
    }  # fmt: skip
    assert "Wrote 2 numbers" in run("--out", str(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [(one["PatientID"], one["IssuerOfPatientID"], one["set"]) for one in rows] == [
        (CANARY, "", "1"), (CANARY, "CANARYHOSP", "1"),
    ]  # fmt: skip
    # Completed with a text editor, it is the mapping.
    decided = _decide(site, "x,,x\n")
    text = io.StringIO()
    completed = csv.DictWriter(text, list(rows[0]))
    completed.writeheader()
    completed.writerows({**row, "person": "one"} for row in rows)
    (site.root / "patients.csv").write_text(text.getvalue())
    assert inspect(decided, None).faults == ()
    assert "no undecided patient numbers" in run()
