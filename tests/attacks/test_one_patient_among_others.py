"""One patient's files and rows take nobody else along: what an attacker did with them, and what a
clerk can do by mistake. Each case is told twice, with the patient and without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data.loading import load_for_run, read_for_check
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.approval import approve
from support import studies
from support.dicom import radiograph, write_dicom

pytestmark = pytest.mark.process

STUDY = studies.study()
PATIENTS = 6


def _accession(number: int) -> str:
    return f"ACC{number}"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Six patients of one image each, their labels by accession number."""
    rows = ["AccessionNumber,finding,comment"]
    for number in range(PATIENTS):
        write_dicom(
            tmp_path / "dicom" / f"{number}" / "0.dcm", radiograph(number), bits_stored=12,
            patient_id=f"P{number}", elements={"AccessionNumber": _accession(number)},
        )  # fmt: skip
        rows.append(f"{_accession(number)},{('normal', 'nodule')[number % 2]},fine")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    policy = Policy(patients_at_most=1_000, min_patients=1)
    return init_site(tmp_path, name="site", policy=policy)


def _seen(site: Site) -> dict[str, tuple[int, list[bytes]]]:
    cohort = load_for_run(site, STUDY)
    return {
        one.pseudonym: (one.label, [cohort.images[place].tobytes() for place in one.images])
        for one in cohort.patients
    }


def _rows(site: Site, change: Callable[[list[str]], list[str]]) -> None:
    header, *rows = site.labels.read_text().splitlines()
    site.labels.write_text("\n".join([header, *change(rows)]) + "\n")


def _copies_under_the_others_accession_numbers(site: Site) -> None:
    found = dcmread(site.dicom / "0" / "0.dcm")
    for number in range(1, PATIENTS):
        found.SOPInstanceUID = generate_uid()
        found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
        found.AccessionNumber = _accession(number)
        found.save_as(site.dicom / "0" / f"copy{number}.dcm")


def _another_s_accession_number_in_its_own_file(site: Site) -> None:
    path = site.dicom / "0" / "0.dcm"
    found = dcmread(path)
    found.AccessionNumber = _accession(1)
    found.save_as(path)


def _rows_with_the_others_accession_numbers(site: Site) -> None:
    _rows(site, lambda rows: [*rows, *(f"{_accession(n)},nodule,new" for n in range(PATIENTS))])


def _a_link_with_a_name_that_is_too_long(site: Site) -> None:
    (site.dicom / "0" / "link").symlink_to("x" * 300)


def _a_quotation_mark_that_is_not_closed(site: Site) -> None:
    _rows(site, lambda rows: ['ACC0,normal,"fine', 'ACC1,nodule,12"', *rows[2:]])


def _a_row_of_64_mebibytes(site: Site) -> None:
    _rows(site, lambda rows: [f"ACC0,normal,{'x' * (64 << 20)}", *rows[1:]])


ATTACKS = [
    _copies_under_the_others_accession_numbers,
    _another_s_accession_number_in_its_own_file,
    _rows_with_the_others_accession_numbers,
    _a_link_with_a_name_that_is_too_long,
    _a_quotation_mark_that_is_not_closed,
    _a_row_of_64_mebibytes,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_frozen_patients_count_whatever_one_of_them_does(
    site: Site, attack: Callable[[Site], None]
) -> None:
    """Each of these took others away, most of them everybody."""
    approve(site, STUDY, read_for_check(site, STUDY))
    before = _seen(site)
    assert len(before) == PATIENTS
    attack(site)
    after = _seen(site)
    first = {name for name in before if before[name] != after.get(name)}
    # At most the one whose file changed.
    assert len(first) <= (attack is _another_s_accession_number_in_its_own_file)
    assert data_notices(site.root).keys() == {STUDY.digest} or attack in {
        _copies_under_the_others_accession_numbers,
        _a_link_with_a_name_that_is_too_long,
    }
    # And without the patient, with files and rows, all the others are the same.
    shutil.rmtree(site.dicom / "0")
    _rows(site, lambda rows: [row for row in rows if not row.startswith("ACC0,")])
    without = _seen(site)
    gone = before.keys() - without.keys()
    assert len(gone) == 1
    assert without == {name: one for name, one in before.items() if name not in gone}


@pytest.mark.parametrize(
    "attack",
    [
        _copies_under_the_others_accession_numbers,
        _a_link_with_a_name_that_is_too_long,
        _a_quotation_mark_that_is_not_closed,
        _a_row_of_64_mebibytes,
    ],
)
def test_where_a_rule_approved_nobody_else_is_taken_along_either(
    site: Site, tmp_path: Path, attack: Callable[[Site], None]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(site.root, other, ignore=shutil.ignore_patterns("other", "index.sqlite*"))
    twin = open_site(other)
    attack(site)
    if attack is _a_quotation_mark_that_is_not_closed:
        _rows(twin, lambda rows: ['ACC1,nodule,12"', *rows[2:]])
    else:
        _rows(twin, lambda rows: rows[1:])
    shutil.rmtree(twin.dicom / "0")
    with_it, without = _seen(site), _seen(twin)
    assert without.keys() <= with_it.keys()
    assert {name: with_it[name] for name in without} == without
    assert len(with_it) - len(without) <= 1
    assert len(without) >= PATIENTS - 2


def test_a_site_whose_folder_is_not_there_freezes_nothing(site: Site) -> None:
    """An archive that was not mounted at the first request was frozen as empty, for good."""
    site.dicom.rename(site.root / "elsewhere")
    assert load_for_run(site, STUDY).patients == ()
    assert manifests.load(site, STUDY) is None
    (site.root / "elsewhere").rename(site.dicom)
    assert len(load_for_run(site, STUDY).patients) == PATIENTS
    assert manifests.load(site, STUDY) is not None


def test_a_broken_row_of_the_mapping_costs_its_own_number(site: Site) -> None:
    (site.root / "people.csv").write_text("PatientID,person\nP0,\nP1,one\nP2,two\n")
    text = (site.root / "site.toml").read_text()
    (site.root / "site.toml").write_text(text.replace('mapping = ""', 'mapping = "people.csv"'))
    seen = _seen(open_site(site.root))
    assert len(seen) == PATIENTS


def test_the_labels_of_a_manifest_are_sealed(site: Site) -> None:
    approve(site, STUDY, read_for_check(site, STUDY))
    manifest = manifests.load(site, STUDY)
    assert manifest is not None
    text = manifests.path_of(site, STUDY).read_text()
    assert "nodule" not in text
    assert '"normal"' not in text
    labels = manifests.labels_of(site, manifest)
    assert sorted(labels.values()) == [("nodule",)] * 3 + [("normal",)] * 3
    assert set(labels) == manifest.images
    # As long for any labels of one length: a bit of it would be one of the patients'.
    assert np.unique(list(bytes.fromhex(manifest.labels))).size > 100
