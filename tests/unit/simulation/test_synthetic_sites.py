from __future__ import annotations

import csv
import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from cloister_fl.simulation import synthetic_sites as module
from cloister_fl.simulation.phantom import CaseMix
from cloister_fl.simulation.synthetic_dicom import patient_header
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import DrawnCohort, DrawnFederation, draw_federation

SMALL = tuple(replace(hospital, patients=20) for hospital in HOSPITALS)
HOLDOUT = 25
JUNK = ("README", "export-notes.txt", "empty.dcm", "truncated.dcm", "no-pixels.dcm")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> DrawnFederation:
    folder = tmp_path_factory.mktemp("drawn") / "federation"
    return draw_federation(folder, seed=5, hospitals=SMALL, holdout_patients=HOLDOUT)


def _cohorts(federation: DrawnFederation) -> tuple[DrawnCohort, ...]:
    return (*federation.sites, federation.holdout)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    few = tuple(replace(hospital, patients=2) for hospital in HOSPITALS)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_federation(tmp_path / name, seed=seed, hospitals=few, holdout_patients=5)
    first, again, other = (_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


@pytest.mark.long
def test_layout_and_labels(federation: DrawnFederation) -> None:
    assert [site.name for site in federation.sites] == [hospital.name for hospital in SMALL]
    for cohort in _cohorts(federation):
        with cohort.labels.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["PatientID", "finding"]
        assert dict(rows[1:]) == cohort.findings
        assert {image.patient_id for image in cohort.images} == set(cohort.findings)
        assert set(cohort.findings.values()) == {"normal", "nodule"}
    for site, hospital in zip(federation.sites, SMALL, strict=True):
        assert site.folder == federation.folder / "sites" / hospital.name
        positive = sum(finding == "nodule" for finding in site.findings.values())
        assert positive == round(hospital.patients * hospital.prevalence)
    assert federation.holdout.folder == federation.folder / "holdout"
    assert len(federation.holdout.findings) == HOLDOUT


def test_the_finding_written_is_the_one_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def watch(rng: np.random.Generator, *, positive: bool, mix: CaseMix) -> object:
        patient = real(rng, positive=positive, mix=mix)
        drawn.append(bool(patient.lesion))
        return patient

    real = module.draw_patient
    monkeypatch.setattr(module, "draw_patient", watch)
    result = draw_federation(tmp_path / "f", seed=3, hospitals=SMALL[:1], holdout_patients=6)
    written = [
        finding == "nodule" for cohort in _cohorts(result) for finding in cohort.findings.values()
    ]
    assert written == drawn


def test_each_file_decodes_to_the_drawn_pixels(federation: DrawnFederation) -> None:
    for cohort in _cohorts(federation):
        for image in cohort.images:
            data = dcmread(federation.folder / image.path)
            pixels = data.pixel_array
            assert hashlib.sha256(pixels.astype("<u2").tobytes()).hexdigest() == image.stored_sha256
            assert data.PatientID == image.patient_id
            assert pixels.max() < 1 << data.BitsStored


def test_headers_are_what_each_hospital_declares(federation: DrawnFederation) -> None:
    for site, hospital in zip(federation.sites, SMALL, strict=True):
        for image in site.images:
            data = dcmread(federation.folder / image.path)
            assert data.file_meta.TransferSyntaxUID == hospital.transfer_syntax
            assert data.SOPClassUID == hospital.sop_class
            assert data.Modality == hospital.modality
            assert data.BurnedInAnnotation == "NO"
            assert data.PhotometricInterpretation == (
                "MONOCHROME1" if hospital.monochrome1 else "MONOCHROME2"
            )
            assert (data.Rows, data.Columns) == (hospital.scanner.rows, hospital.scanner.columns)
            assert data.BitsStored == hospital.scanner.bits_stored
            assert ("WindowCenter" in data) == hospital.windowed
            assert ("PixelPaddingValue" in data) == hospital.padded
            assert data.PatientID.startswith(hospital.prefix)
    assert len({hospital.transfer_syntax for hospital in HOSPITALS}) == 4
    assert sum(hospital.monochrome1 for hospital in HOSPITALS) == 1
    assert sum(hospital.padded for hospital in HOSPITALS) == 1


def test_once_inverted_every_hospital_shows_dense_as_bright(federation: DrawnFederation) -> None:
    for site, hospital in zip(federation.sites, SMALL, strict=True):
        pixels = dcmread(federation.folder / site.images[0].path).pixel_array.astype(float)
        if hospital.monochrome1:
            pixels = (1 << hospital.scanner.bits_stored) - 1 - pixels
        middle, width = pixels.shape[1] // 2, pixels.shape[1]
        rows = slice(pixels.shape[0] // 3, pixels.shape[0] // 2)
        spine = pixels[rows, middle - 2 : middle + 2].mean()
        lung = pixels[rows, int(0.25 * width) : int(0.35 * width)].mean()
        assert spine > 1.2 * lung


def test_padding_is_on_the_border_and_nowhere_else(federation: DrawnFederation) -> None:
    site = next(s for s, h in zip(federation.sites, SMALL, strict=True) if h.padded)
    data = dcmread(federation.folder / site.images[0].path)
    padding = data.pixel_array == data.PixelPaddingValue
    assert padding[:3].all()
    assert padding[:, -3:].all()
    assert not padding[3:-3, 3:-3].any()


def test_one_to_six_images_a_patient_and_unique_instances(federation: DrawnFederation) -> None:
    counts = Counter(image.patient_id for cohort in _cohorts(federation) for image in cohort.images)
    assert set(counts.values()) <= {1, 2, 3, 4, 5, 6}
    assert max(counts.values()) > 1
    uids = [
        dcmread(federation.folder / image.path, stop_before_pixels=True).SOPInstanceUID
        for cohort in _cohorts(federation)
        for image in cohort.images
    ]
    assert len(set(uids)) == len(uids)


def test_no_patient_is_in_two_cohorts(federation: DrawnFederation) -> None:
    ids = [patient for cohort in _cohorts(federation) for patient in cohort.findings]
    assert len(set(ids)) == len(ids)
    scanners = Counter(patient[:2] for patient in federation.holdout.findings)
    assert scanners == {hospital.prefix: HOLDOUT // len(SMALL) for hospital in SMALL}


def test_no_two_synthetic_patients_look_like_one_person() -> None:
    rng = np.random.default_rng(0)
    headers = [patient_header(rng, SMALL[0], f"P{number:05d}") for number in range(1000)]
    assert len({(one["PatientName"], one["PatientBirthDate"]) for one in headers}) == 1000


def test_junk_is_there_and_is_no_image(federation: DrawnFederation) -> None:
    for site in federation.sites:
        known = {federation.folder / image.path for image in site.images}
        found = {path for path in site.dicom.rglob("*") if path.is_file()}
        assert {path.name for path in found - known} == set(JUNK)
        for name in ("README", "export-notes.txt", "empty.dcm"):
            with pytest.raises((InvalidDicomError, EOFError)):
                dcmread(site.dicom / name)
        assert "PixelData" not in dcmread(site.dicom / "no-pixels.dcm")
    junk = {path.name for path in federation.holdout.dicom.rglob("*")} & set(JUNK)
    assert junk == set()


def test_a_truncated_file_is_shorter_than_it_declares(federation: DrawnFederation) -> None:
    for site in federation.sites:
        whole = (federation.folder / site.images[0].path).read_bytes()
        cut = (site.dicom / "truncated.dcm").read_bytes()
        assert whole.startswith(cut)
        assert len(cut) < len(whole) // 2


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        draw_federation(tmp_path, seed=0, hospitals=SMALL, holdout_patients=5)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(_name: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_federation(tmp_path / "f", seed=0, hospitals=SMALL, holdout_patients=5, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_patient(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    few = tuple(replace(hospital, patients=2) for hospital in SMALL[:2])
    draw_federation(
        tmp_path / "f",
        seed=0,
        hospitals=few,
        holdout_patients=3,
        progress=lambda name, done, total: heard.append((name, done, total)),
    )
    expected = [(hospital.name, done, 2) for hospital in few for done in (1, 2)]
    assert heard == expected + [("holdout", done, 3) for done in (1, 2, 3)]


def test_two_hospitals_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share a name"):
        draw_federation(tmp_path / "f", seed=0, hospitals=(SMALL[0], SMALL[0]))
    assert list(tmp_path.iterdir()) == []


def test_each_cohort_has_the_mimics_of_its_hospital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def watch(rng: np.random.Generator, *, positive: bool, mix: CaseMix) -> object:
        drawn.append(mix)
        return real(rng, positive=positive, mix=mix)

    real = module.draw_patient
    monkeypatch.setattr(module, "draw_patient", watch)
    few = tuple(replace(hospital, patients=2) for hospital in HOSPITALS)
    draw_federation(tmp_path / "f", seed=1, hospitals=few, holdout_patients=5)
    mixes = [hospital.mix for hospital in HOSPITALS]
    assert drawn == [mix for mix in mixes for _ in range(2)] + mixes


def test_the_hospitals_see_every_mimic_together_and_none_sees_all() -> None:
    mixes = np.array([hospital.mix for hospital in HOSPITALS])
    assert (mixes.sum(axis=0) > 0).all()
    assert (mixes == 0).any(axis=1).all()


def test_the_demo_stays_moderate_and_uneven() -> None:
    assert sum(hospital.patients for hospital in HOSPITALS) <= 1000
    assert all(80 <= hospital.patients <= 250 for hospital in HOSPITALS)
    shares = [hospital.prevalence for hospital in HOSPITALS]
    assert min(shares) <= 0.35
    assert max(shares) >= 0.65
