"""What hospitals have on their first day is taken: each case was once refused.

Skewed hospitals, a few files and rows that are of no use, tables as a clinic's programs write them.
That a run delivers its best model is in test_ended_early; what a killed one leaves, in
test_kill_and_resume; that a balanced accuracy at chance is told, in test_artifacts; on how many
patients a figure was measured, in test_holdout_in_words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.data.loading import freeze, load_for_run
from cloister_fl.client.preflight.data_check import inspect
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.study.schema import Study
from support import studies
from support.dicom import write_dicom
from support.federations import picture
from support.workbooks import write_workbook

pytestmark = pytest.mark.process

PATIENTS = 30
CLASSES = ("normal", "Läsion", "Rundherd")
PRIVACY = ("epsilon = 6.0", "enabled = false")


def asked(privacy: str, classes: tuple[str, ...] = CLASSES) -> Study:
    return studies.study(target={"column": "finding", "classes": classes}, privacy=privacy)


def hospital(root: Path, classes: tuple[str, ...], *, head: str = "PatientID,finding") -> Site:
    """Thirty patients with these classes in turn; the policy is the usual one, and allows a study
    without privacy, from whatever classes there are."""
    rng, rows = np.random.default_rng(0), [head]
    for number in range(PATIENTS):
        patient, label = f"P{number:03d}", number % len(classes)
        rows.append(f"{patient},{classes[label]}")
        path = root / "dicom" / f"{number}.dcm"
        write_dicom(path, picture(rng, label % 2), patient_id=patient, bits_stored=12)
    (root / "labels.csv").write_text("\n".join(rows) + "\n", "utf-8")
    policy = Policy(
        patients_at_most=1_000,
        allow_without_privacy=True,
        min_patients_per_class_without_privacy=0,
    )
    return init_site(root, name="north", policy=policy)


def require_taken(site: Site, study: Study, patients: int = PATIENTS) -> None:
    """The preflight allows it, it is frozen, and a run trains on these patients."""
    found = inspect(site, study)
    assert (found.faults, found.patients) == ((), patients)
    freeze(site, study)
    assert len(load_for_run(site, study).patients) == patients


@pytest.mark.parametrize("privacy", PRIVACY)
@pytest.mark.parametrize("classes", [CLASSES[:1], CLASSES[1:2], CLASSES[:2], CLASSES[1:]])
def test_a_hospital_lacks_a_class_or_has_one_alone(
    tmp_path: Path, classes: tuple[str, ...], privacy: str
) -> None:
    """CLO-204, and CLO-207 of three classes, which no policy could allow."""
    require_taken(hospital(tmp_path, classes), asked(privacy))


def left_out(site: Site) -> Site:
    """The site, whose steward lets it go on without a tenth of its images and rows."""
    file = site.root / "site.toml"
    text = file.read_text("utf-8").replace('on_mismatch = "refuse"', 'on_mismatch = "leave out"')
    file.write_text(text.replace("left_out_at_most = 5.0", "left_out_at_most = 10.0"), "utf-8")
    return open_site(site.root)


def three_files_are_damaged(site: Site) -> None:
    for number in (3, 4, 5):
        file = site.dicom / f"{number}.dcm"
        file.write_bytes(file.read_bytes()[:-400])


def two_images_have_no_row(site: Site) -> None:
    lines = (site.root / "labels.csv").read_text("utf-8").splitlines()
    (site.root / "labels.csv").write_text("\n".join(lines[:-2]) + "\n", "utf-8")


@pytest.mark.parametrize("privacy", PRIVACY)
@pytest.mark.parametrize(
    ("damage", "patients"), [(three_files_are_damaged, 27), (two_images_have_no_row, 28)]
)
def test_a_few_files_or_rows_are_of_no_use(
    tmp_path: Path, damage: Callable[[Site], None], patients: int, privacy: str
) -> None:
    """3 damaged files of 30, or 2 images of 30 without a label, kept the whole site out."""
    site = left_out(hospital(tmp_path, CLASSES))
    damage(site)
    require_taken(site, asked(privacy), patients)


def named(site: Site, table: str) -> Site:
    """The site with other settings of its labels, as docs/labels.md says."""
    file = site.root / "site.toml"
    lines = file.read_text("utf-8").splitlines()
    (at,) = (place for place, line in enumerate(lines) if line.startswith("labels = "))
    lines[at] = table
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return open_site(site.root)


TABLE = """labels.file = "labels.csv"
labels.columns = { PatientID = "Patienten-ID", finding = "Befund" }"""


@pytest.mark.parametrize("privacy", PRIVACY)
def test_a_column_is_called_patienten_id(tmp_path: Path, privacy: str) -> None:
    site = hospital(tmp_path, CLASSES, head="Patienten-ID,Befund")
    require_taken(named(site, TABLE), asked(privacy))


def test_a_spreadsheet_took_the_leading_zeros(tmp_path: Path) -> None:
    """Numbers are compared by keyed hashes; what a person mends is told of them as written."""
    site = hospital(tmp_path, CLASSES)
    text = (site.root / "labels.csv").read_text("utf-8")
    (site.root / "labels.csv").write_text(text.replace("\nP00", "\nP").replace("\nP0", "\nP"))
    told = "".join(map(str, inspect(site, asked(PRIVACY[0])).faults))
    assert "29 rows would fit but for leading zeros in PatientID" in told
    assert "P7" not in told


@pytest.mark.parametrize("name", ["befunde.xlsx", "labels.csv"])
def test_rows_that_were_left_out_are_no_news_in_a_run(tmp_path: Path, name: str) -> None:
    """Of a workbook with an empty cell, each private run said that all images had changed."""
    site = left_out(hospital(tmp_path, CLASSES))
    rows = [line.split(",") for line in (site.root / "labels.csv").read_text("utf-8").splitlines()]
    rows[3][1] = ""
    if name == "befunde.xlsx":
        write_workbook(site.root / name, {"Tabelle1": rows})
        site = named(site, f'labels = "{name}"')
    else:
        (site.root / name).write_text("\n".join(map(",".join, rows)) + "\n", "utf-8")
    require_taken(site, asked(PRIVACY[0]), PATIENTS - 1)
    assert data_notices(site.root) == {}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_umlaut_was_typed_on_a_mac(tmp_path: Path, form: str) -> None:
    """As ``u`` and its dots, in the table, the study, or both."""
    site = hospital(tmp_path, CLASSES)
    text = (site.root / "labels.csv").read_text("utf-8")
    (site.root / "labels.csv").write_text(unicodedata.normalize("NFD", text), "utf-8")
    one, other, third = (unicodedata.normalize(form, name) for name in CLASSES)
    require_taken(site, asked(PRIVACY[0], (one, other, third)))
