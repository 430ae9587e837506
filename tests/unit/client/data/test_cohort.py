"""From a folder and a labels file to patients; every fault of the list; the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.client.data.cohort import Cohort, Patient, same, split
from cloister_fl.client.data.file_cache.image_cache import Cache
from cloister_fl.client.data.loading import load_cohort, read_cohort
from cloister_fl.client.data.targets import UNLABELLED
from cloister_fl.client.dicom import file_finder
from cloister_fl.client.dicom.acceptance import precheck
from cloister_fl.client.dicom.image import read_image
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox import pool as pools
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training.sampling import Bag, pixels_of
from cloister_fl.errors import (
    CohortTooSmall,
    FolderUnreadable,
    LabelMissing,
    LabelsInvalid,
    LabelWithoutImage,
    OneClassOnly,
    Reject,
    SiteEmpty,
)
from cloister_fl.study.schema import Input
from support import studies
from support.dicom import make_dicom, radiograph, write_dicom, write_site
from support.errors import raises

pytestmark = pytest.mark.process


STUDY = studies.study()


def _site(root: Path, patients: int = 6, images: int = 1, **options: Any) -> Site:
    least = options.pop("least", 1)
    write_site(root, patients, images, **options)
    return init_site(
        root,
        name="site",
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=least),
    )


def _edit_labels(site: Site, change: Callable[[list[str]], list[str]]) -> None:
    lines = site.labels.read_text().splitlines()
    site.labels.write_text("\n".join(change(lines)) + "\n")


def test_cohort_of_a_site(tmp_path: Path) -> None:
    site = _site(tmp_path, 6, 2)
    cohort = load_cohort(site, STUDY)
    assert cohort.images.shape == (12, 32, 32)
    assert cohort.images[0].dtype == np.uint16
    assert [len(patient.images) for patient in cohort.patients] == [2] * 6
    marks = [patient.mark for patient in cohort.patients]
    assert marks == sorted(marks)
    first = cohort.images[cohort.patients[0].images[0]]
    assert marks[0] == hashlib.sha256(first.tobytes()).hexdigest()
    assert sorted(i for patient in cohort.patients for i in patient.images) == list(range(12))
    assert cohort.modalities == {"DX": 12}
    assert cohort.shapes == {(48, 40): 12}
    assert cohort.rejects == {}
    key = site.pseudonym_key()
    expected = {pseudonym(key, STUDY.digest, "", f"MRN{n:05d}"): n % 2 for n in range(6)}
    assert {patient.pseudonym: patient.label for patient in cohort.patients} == expected


def test_images_belong_to_their_patients(tmp_path: Path) -> None:
    site = _site(tmp_path, 4, 1)
    cohort = load_cohort(site, STUDY)
    key = site.pseudonym_key()
    for number in range(4):
        name = pseudonym(key, STUDY.digest, "", f"MRN{number:05d}")
        (patient,) = (one for one in cohort.patients if one.pseudonym == name)
        data = make_dicom(radiograph(1000 * number), bits_stored=12, patient_id="x")
        _, alone = read_image(precheck(data, ("DX",)), STUDY.input)
        assert np.array_equal(cohort.images[patient.images[0]], alone)


def test_structure_of_the_folder_does_not_matter(tmp_path: Path) -> None:
    site = _site(tmp_path, 5, 2)
    before = load_cohort(site, STUDY)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(site.dicom.rglob("*.dcm"), reverse=True)):
        path.rename(flat / f"{number:03d}")
    after = load_cohort(dataclasses.replace(site, dicom=flat), STUDY)
    assert after.patients == before.patients
    assert np.array_equal(after.images, before.images)


@pytest.mark.parametrize("key", ["AccessionNumber", "PatientID"])
def test_other_key_columns(tmp_path: Path, key: str) -> None:
    cohort = load_cohort(_site(tmp_path, 4, 2, key=key), STUDY)
    assert Counter(patient.label for patient in cohort.patients) == {0: 2, 1: 2}


def test_several_classes(tmp_path: Path) -> None:
    classes = ("normal", "nodule", "mass")
    study = STUDY.model_copy(
        update={"target": STUDY.target.model_copy(update={"classes": classes})}
    )
    cohort = load_cohort(_site(tmp_path, 7, classes=classes), study)
    assert Counter(patient.label for patient in cohort.patients) == {0: 3, 1: 2, 2: 2}


def test_without_labels(tmp_path: Path) -> None:
    site = _site(tmp_path, 2)
    site.labels.unlink()
    cohort = load_cohort(site, STUDY, require_labels=False)
    assert {patient.label for patient in cohort.patients} == {UNLABELLED}


def test_missing_label(tmp_path: Path) -> None:
    site = _site(tmp_path)
    _edit_labels(site, lambda lines: lines[:-1])
    with raises(LabelMissing, match="1 image has no label"):
        load_cohort(site, STUDY)


def test_label_for_no_image(tmp_path: Path) -> None:
    site = _site(tmp_path)
    _edit_labels(site, lambda lines: [*lines, "1.2.3.4,normal"])
    with pytest.raises(LabelWithoutImage, match=r"Lines of the labels file: 8\."):
        load_cohort(site, STUDY)


def test_label_of_a_refused_image(tmp_path: Path) -> None:
    site = _site(tmp_path)
    path = sorted(site.dicom.rglob("*.dcm"))[0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(LabelWithoutImage, match=r"Lines of the labels file: 2\."):
        load_cohort(site, STUDY)


def test_labels_file_missing(tmp_path: Path) -> None:
    site = _site(tmp_path)
    site.labels.unlink()
    with pytest.raises(LabelsInvalid):
        load_cohort(site, STUDY)


def test_empty_site(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    site.dicom.mkdir()
    site.labels.write_text("PatientID,finding\n")
    with raises(SiteEmpty, match="It holds no file"):
        load_cohort(site, STUDY)
    (site.dicom / "notes.txt").write_text("CANARY")
    with raises(SiteEmpty, match=r"1 x not a DICOM file \(CLO-210\)"):
        load_cohort(site, STUDY)


def test_unreadable_folder(tmp_path: Path) -> None:
    site = init_site(tmp_path)
    with pytest.raises(FolderUnreadable):
        load_cohort(site, STUDY)
    site.dicom.write_text("a file")
    with pytest.raises(FolderUnreadable):
        load_cohort(site, STUDY)
    site.dicom.unlink()
    site.dicom.symlink_to(site.dicom)
    with pytest.raises(FolderUnreadable):
        load_cohort(site, STUDY)


def test_one_class(tmp_path: Path) -> None:
    site = _site(tmp_path, 4)
    _edit_labels(site, lambda lines: [line.replace("nodule", "normal") for line in lines])
    with raises(OneClassOnly, match="'normal'"):
        load_cohort(site, STUDY)


def test_nine_patients_are_too_few(tmp_path: Path) -> None:
    site = _site(tmp_path, 19, least=10)
    with raises(CohortTooSmall, match="'nodule' has 9") as caught:
        load_cohort(site, STUDY)
    assert "'normal'" not in str(caught.value)
    assert "policy.min_patients_per_class" in str(caught.value)


def test_junk_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    site = _site(tmp_path)
    junk = site.dicom / "junk"
    write_dicom(junk / "us", elements={"Modality": "US"})
    write_dicom(junk / "ct", modality="CT")
    write_dicom(junk / "mz", preamble=b"MZ".ljust(128, b"\0"))
    (junk / "readme.txt").write_text("hello")
    (junk / "empty").write_bytes(b"")
    (junk / "cut").write_bytes(make_dicom()[:-99])
    (junk / "DICOMDIR").write_bytes(b"x")
    (junk / "out").symlink_to("/etc/hostname")
    cohort = load_cohort(site, STUDY)
    assert len(cohort.patients) == 6
    assert cohort.rejects == {
        Reject.NOT_DICOM: 2,
        Reject.TRUNCATED: 1,
        Reject.MODALITY: 2,
        Reject.PREAMBLE: 1,
        Reject.OUTSIDE_ROOT: 1,
    }


def test_duplicates(tmp_path: Path) -> None:
    site = _site(tmp_path, 4)
    first = sorted(site.dicom.rglob("*.dcm"))[0]
    shutil.copy(first, site.dicom / "zz-copy.dcm")
    write_dicom(
        site.dicom / "zz-same-pixels.dcm",
        radiograph(0),
        bits_stored=12,
        patient_id="MRN00000",
        elements={"SOPInstanceUID": "1.2.3"},
    )
    cohort = load_cohort(site, STUDY)
    assert cohort.rejects == {Reject.DUPLICATE: 2}
    assert len(cohort.images) == 4


def test_same_pixels_of_two_patients_are_two_images(tmp_path: Path) -> None:
    site = _site(tmp_path, 4)
    write_dicom(site.dicom / "other.dcm", radiograph(0), bits_stored=12, patient_id="other")
    cohort = load_cohort(site, STUDY, require_labels=False)
    assert len(cohort.images) == 5


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_cohort(_site(tmp_path, 3), STUDY, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files that were given to a worker."""
    sizes: list[int] = []
    submitted = Pool.submit

    def submit(pool: Pool, data: bytes, spec: Input, **rest: Any) -> Future[pools.Reading]:
        sizes.append(len(data))
        return submitted(pool, data, spec, **rest)

    monkeypatch.setattr(Pool, "submit", submit)
    return sizes


def test_second_load_decodes_nothing(tmp_path: Path, decoded: list[int]) -> None:
    site = _site(tmp_path)
    first = load_cohort(site, STUDY)
    assert len(decoded) == 6
    again = load_cohort(site, STUDY)
    assert len(decoded) == 6
    assert np.array_equal(again.images, first.images)
    assert again.patients == first.patients


def _settle(folder: Path) -> None:
    """Let a folder's files look as if they were written a while ago."""
    end = max(path.stat().st_ctime_ns for path in folder.rglob("*")) + file_finder._SETTLED_NS
    while time.time_ns() <= end:
        time.sleep(0.1)


def test_what_did_not_change_is_not_opened(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = _site(tmp_path)
    (site.dicom / "zz.txt").write_text("no DICOM")
    _settle(site.dicom)
    first = read_cohort(site, STUDY)
    opened: list[str] = []
    read = file_finder.read_file

    def noted(path: Path, root: Path | None = None) -> bytes:
        opened.append(path.name)
        return read(path, root)

    monkeypatch.setattr(file_finder, "read_file", noted)
    again = read_cohort(site, STUDY)
    assert opened == []
    assert again.rejects == first.rejects == {Reject.NOT_DICOM: 1}
    assert again.cohort is not None
    assert first.cohort is not None
    assert same(again.cohort, first.cohort)
    changed = sorted(site.dicom.rglob("*.dcm"))[2]
    write_dicom(changed, radiograph(99), bits_stored=12, patient_id="MRN00002")
    write_dicom(site.dicom / "new.dcm", radiograph(98), bits_stored=12, patient_id="MRN00001")
    (site.dicom / "zz.txt").write_text("still no DICOM")
    now = read_cohort(site, STUDY)
    assert sorted(opened) == sorted([changed.name, "new.dcm", "zz.txt"])
    assert len(decoded) == 6 + 1 + 3
    assert now.cohort is not None
    assert not same(now.cohort, first.cohort)


def test_a_file_with_the_old_size_and_time_is_read_all_the_same(tmp_path: Path) -> None:
    site = _site(tmp_path)
    _settle(site.dicom)
    first = load_cohort(site, STUDY)
    path = sorted(site.dicom.rglob("*.dcm"))[0]
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    _settle(site.dicom)
    assert not np.array_equal(load_cohort(site, STUDY).images, first.images)


@pytest.mark.parametrize("damage", [b"", b"SQLite format 3\0" + bytes(90), bytes(4096)])
def test_a_damaged_index_costs_time_only(tmp_path: Path, damage: bytes) -> None:
    site = _site(tmp_path)
    first = load_cohort(site, STUDY)
    (site.root / "index.sqlite").write_bytes(damage)
    assert same(load_cohort(site, STUDY), first)
    assert (site.root / "index.sqlite").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "cell", ["'é'", "NULL", *(pytest.param(one, marks=pytest.mark.slow) for one in ("7", "0.5"))]
)
@pytest.mark.parametrize("column", ["content", "seal", "stamp"])
def test_a_cell_of_another_type_costs_time_only(tmp_path: Path, cell: str, column: str) -> None:
    site = _site(tmp_path)
    (site.dicom / "broken").write_bytes(b"nothing")
    _settle(site.dicom)
    first = read_cohort(site, STUDY)
    with contextlib.closing(sqlite3.connect(site.root / "index.sqlite")) as rows:
        rows.execute(f"UPDATE files SET {column} = {cell}")
        if column != "stamp":
            other = "reason" if column == "content" else column
            rows.execute(f"UPDATE rejects SET {other} = {cell}")
        rows.commit()
    again = read_cohort(site, STUDY)
    assert again.rejects == first.rejects
    assert first.cohort is not None
    assert again.cohort is not None
    assert same(again.cohort, first.cohort)


def test_a_folder_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    site = _site(tmp_path, 1)
    inner, away = site.dicom / "inner", tmp_path / "away"
    inner.mkdir()
    (inner / "file").write_bytes(b"bytes")
    (one,) = (found for found in file_finder.discover(site.dicom) if found.path.name == "file")
    assert one.read() == b"bytes"
    inner.rename(away)
    inner.symlink_to(away)
    with pytest.raises(RejectedFile) as caught:
        one.read()
    assert caught.value.reason is Reject.OUTSIDE_ROOT


def test_an_index_that_points_to_another_file_is_not_believed(tmp_path: Path) -> None:
    site = _site(tmp_path)
    _settle(site.dicom)
    first = load_cohort(site, STUDY)
    with sqlite3.connect(site.root / "index.sqlite") as rows:
        (content,) = rows.execute("SELECT content FROM files LIMIT 1").fetchone()
        assert rows.execute("UPDATE files SET content = ?", (content,)).rowcount == 6
    rows.close()
    assert same(load_cohort(site, STUDY), first)


def test_tampered_entry_is_decoded_again_counted_and_mended(
    tmp_path: Path, decoded: list[int]
) -> None:
    site = _site(tmp_path)
    first = load_cohort(site, STUDY)
    entries = sorted(site.cache.iterdir())
    data = bytearray(entries[0].read_bytes())
    data[-20] ^= 1
    entries[0].write_bytes(data)
    entries[1].write_bytes(entries[1].read_bytes()[:5])
    entries[3].write_bytes(entries[2].read_bytes())
    again = read_cohort(site, STUDY)
    assert again.cohort is not None
    assert np.array_equal(again.cohort.images, first.images)
    assert again.damaged == 3
    assert len(decoded) == 6 + 3
    assert read_cohort(site, STUDY).damaged == 0
    assert len(decoded) == 6 + 3


def test_cache_is_private_and_holds_no_plain_byte(tmp_path: Path) -> None:
    site = _site(tmp_path)
    cohort = load_cohort(site, STUDY)
    plain = cohort.images[0].astype("<u2").tobytes()
    for entry in site.cache.iterdir():
        data = entry.read_bytes()
        assert entry.stat().st_mode & 0o777 == 0o600
        assert b"MRN" not in data
        assert b"sop_instance" not in data
        assert plain[1000:1016] not in data
        assert b"MRN" not in entry.name.encode()


def test_another_input_or_file_finds_no_stale_entry(tmp_path: Path, decoded: list[int]) -> None:
    site = _site(tmp_path)
    load_cohort(site, STUDY)
    other = STUDY.model_copy(update={"input": STUDY.input.model_copy(update={"size": 48})})
    assert load_cohort(site, other).images.shape[1:] == (48, 48)
    path = sorted(site.dicom.rglob("*.dcm"))[0]
    write_dicom(path, radiograph(77), bits_stored=12, patient_id="MRN00000")
    del decoded[:]
    read_cohort(site, STUDY, require_labels=False)
    assert len(decoded) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = _site(tmp_path)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    assert len(load_cohort(site, STUDY).patients) == 6
    assert list(site.cache.iterdir()) == []


def test_cache_key_matters(tmp_path: Path) -> None:
    image = np.arange(16, dtype=np.uint16).reshape(4, 4)
    cache = Cache(tmp_path, bytes(32))
    name = cache.name(bytes(32), "00" * 32)
    cache.put(name, {"a": "b", "n": 1}, image)
    facts, found = cache.get(name) or ({}, image[:0])
    assert facts == {"a": "b", "n": 1}
    assert np.array_equal(found, image)
    other = Cache(tmp_path, bytes([1]) * 32)
    assert other.name(bytes(32), "00" * 32) != name
    assert other.get(name) is None
    assert other.damaged == 1


def _cohort(labels: list[int]) -> Cohort:
    patients = tuple(
        Patient(f"{n * 7919:064x}", label, (2 * n, 2 * n + 1)) for n, label in enumerate(labels)
    )
    images = np.arange(len(labels) * 2, dtype=np.uint16)[:, None, None] * np.ones(
        (1, 4, 4), np.uint16
    )
    return Cohort(images, patients, {}, {}, {})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0, 0.99))
def test_split_by_patient(labels: list[int], fraction: float) -> None:
    whole = _cohort(labels)
    kept, apart = split(whole, fraction)
    names = [{one.pseudonym for one in part.patients} for part in (kept, apart)]
    assert names[0] | names[1] == {one.pseudonym for one in whole.patients}
    assert not names[0] & names[1]
    for part in (kept, apart):
        assert len(part.images) == 2 * len(part.patients)
        for one in part.patients:
            number = int(one.pseudonym, 16) // 7919
            assert [int(part.images[i][0, 0]) for i in one.images] == [2 * number, 2 * number + 1]
            assert one.label == labels[number]
    for label, count in Counter(labels).items():
        taken = sum(one.label == label for one in apart.patients)
        assert taken < count
        wanted = int(count * fraction + 0.5)
        assert taken == min(max(wanted, 1 if fraction > 0 else 0), count - 1)


def test_split_is_stable(tmp_path: Path) -> None:
    site = _site(tmp_path, 12)
    first = split(load_cohort(site, STUDY), 0.3)
    again = split(load_cohort(site, STUDY), 0.3)
    assert [part.patients for part in first] == [part.patients for part in again]
    with pytest.raises(ValueError):
        split(first[0], 1.0)


def test_pixels_run_from_minus_two_to_two() -> None:
    cohort = Cohort(
        np.array([[[0, 65535], [1, 32768]]], dtype=np.uint16).repeat(3, 0), (), {}, {}, {}
    )
    found = pixels_of(cohort, [Bag(np.array([2])), Bag(np.array([0]))])
    assert found.shape == (2, 1, 2, 2)
    assert str(found.dtype) == "torch.float32"
    expected = [-2, 2, (1 / 65535 - 0.5) / 0.25, (32768 / 65535 - 0.5) / 0.25]
    assert found[0].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_order_and_split_do_not_depend_on_the_sites_keys(tmp_path: Path) -> None:
    kept: list[tuple[list[str], list[str]]] = []
    for name in ("one", "two"):
        cohort = load_cohort(_site(tmp_path / name, 8, 2), STUDY)
        apart = split(cohort, 0.25)[1]
        kept.append(([p.mark for p in cohort.patients], [p.mark for p in apart.patients]))
    assert kept[0] == kept[1]
    assert len(kept[0][1]) == 2
