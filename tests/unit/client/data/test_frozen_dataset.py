"""A study's data are frozen: what changes afterwards is refused, and named by pseudonym."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data import loading
from cloister_fl.client.data.loading import freeze, load_frozen, read_cohort
from cloister_fl.client.data.sealed_labels import open_labels, seal_labels
from cloister_fl.client.dicom.pixels import preprocessing_digest
from cloister_fl.client.site.audit_log import entries_of, path_of
from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import DataChanged, LabelsInvalid, OptionInvalid, SiteEmpty
from support import studies
from support.dicom import radiograph, write_dicom, write_site
from support.errors import raises

pytestmark = pytest.mark.process


STUDY = studies.study()
MRN = "MRN00002"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_site(tmp_path, 6, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    load_frozen(site, STUDY)
    return site


def _file(site: Site) -> Path:
    (found,) = (path for path in site.dicom.rglob("*.dcm") if MRN.encode() in path.read_bytes())
    return found


def _patient(site: Site) -> str:
    return pseudonym(site.pseudonym_key(), STUDY.digest, "", MRN)


def _flip_pixel(site: Site) -> None:
    data = bytearray(_file(site).read_bytes())
    data[-2] ^= 1
    _file(site).write_bytes(data)


def _flip_pixel_and_hide_it(site: Site) -> None:
    about = _file(site).stat()
    _flip_pixel(site)
    os.utime(_file(site), ns=(about.st_atime_ns, about.st_mtime_ns))


def _flip_header(site: Site) -> None:
    data = _file(site).read_bytes()
    _file(site).write_bytes(data.replace(b"MONOCHROME2 ", b"MONOCHROME2\0"))
    assert _file(site).read_bytes() != data


def _flip_label(site: Site) -> None:
    text = site.labels.read_text()
    assert f"{MRN},normal" in text
    site.labels.write_text(text.replace(f"{MRN},normal", f"{MRN},nodule"))


def _entry(site: Site) -> Path:
    """The cache's file of the patient's image: the one that is made when all others are there."""
    before = {path.name: path.read_bytes() for path in site.cache.iterdir()}
    for name, data in before.items():
        (site.cache / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        reading = read_cohort(site, STUDY, frozen=manifests.load(site, STUDY))
        (site.cache / name).write_bytes(data)
        if _patient(site)[:12] in str(reading.faults[0]):
            return site.cache / name
    raise AssertionError("no entry is the patient's")


def _flip_cache(site: Site) -> None:
    entry = _entry(site)
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_flip_pixel, "its pixels changed"),
        (_flip_pixel_and_hide_it, "its pixels changed"),
        (_flip_header, "its file changed, its pixels did not"),
        (_flip_label, "its label changed"),
        (_flip_cache, "its cached pixels were altered"),
        (lambda site: _file(site).unlink(), "it is missing or rejected"),
    ],
)
def test_one_flipped_byte_is_refused_and_named(
    site: Site, change: Callable[[Site], None], told: str
) -> None:
    change(site)
    with raises(DataChanged) as caught:
        load_frozen(site, STUDY)
    message = str(caught.value)
    assert "1 of 6 images" in message
    assert f"of patient {_patient(site)[:12]}: {told}" in message
    assert MRN not in message
    if change is _flip_cache:
        # It was decoded anew from the file, whose bytes are those that were frozen.
        load_frozen(site, STUDY)
    else:
        with raises(DataChanged):
            load_frozen(site, STUDY)


def test_what_did_not_change_runs_again(site: Site) -> None:
    first = load_frozen(site, STUDY)
    # Moved, and touched: the same bytes under another name are the same image.
    (site.dicom / "moved").mkdir()
    _file(site).rename(site.dicom / "moved" / "x.dcm")
    again = load_frozen(site, STUDY)
    assert [one.pseudonym for one in again.patients] == [one.pseudonym for one in first.patients]
    assert len([one for one in entries_of(site) if one.kind == "frozen"]) == 1


def test_images_that_come_later_are_no_part_of_the_study(site: Site) -> None:
    before = load_frozen(site, STUDY)
    write_dicom(site.dicom / "late.dcm", radiograph(70), bits_stored=12, patient_id="LATE")
    write_dicom(site.dicom / "more.dcm", radiograph(71), bits_stored=12, patient_id=MRN)
    reading = read_cohort(site, STUDY, frozen=manifests.load(site, STUDY))
    assert reading.later == 2
    assert load_frozen(site, STUDY).patients == before.patients


@pytest.mark.parametrize("where", ["!first.dcm", "zz-last.dcm"])
@pytest.mark.parametrize("what", ["another UID", "another header"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_that_looks_like_a_frozen_one_does_not_take_its_place(
    site: Site, where: str, what: str, indexed: bool
) -> None:
    """An archive sends an image again, under a name that comes before the first one's."""
    before = load_frozen(site, STUDY)
    stored = pydicom.dcmread(_file(site))
    if what == "another UID":
        stored.SOPInstanceUID = stored.file_meta.MediaStorageSOPInstanceUID = "2.25.777"
    else:
        stored.StationName = "CT2"
    stored.save_as(site.dicom / where)
    if not indexed:
        (site.root / "index.sqlite").unlink()
    assert load_frozen(site, STUDY).patients == before.patients


def _another_comes_first(
    site: Site, monkeypatch: pytest.MonkeyPatch, *, before: bool, read: Any = loading.read_cohort
) -> None:
    """While the first reading is under way another run freezes, and an image comes."""
    begun = []

    def reading(*given: Any, **named: Any) -> Any:
        if begun:
            return read(*given, **named)
        begun.append(True)
        found = read(*given, **named) if before else None
        if not before:
            load_frozen(site, STUDY)
        write_dicom(site.dicom / "late.dcm", radiograph(70), bits_stored=12, patient_id=MRN)
        if before:
            load_frozen(site, STUDY)
        return found or read(*given, **named)

    monkeypatch.setattr(loading, "read_cohort", reading)


@pytest.mark.parametrize("more", [True, False])
def test_two_first_runs_at_once_freeze_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    """Also where one saw an image that the other, who froze, had not seen: it trains on none."""
    write_site(tmp_path, 6, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    _another_comes_first(site, monkeypatch, before=more)
    assert len(load_frozen(site, STUDY).images) == 6 + more
    assert len([one for one in entries_of(site) if one.kind == "frozen"]) == 1
    assert len(load_frozen(site, STUDY).images) == 6 + more


def test_freezing_beside_a_first_run_does_not_replace_what_that_froze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_site(tmp_path, 6, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    _another_comes_first(site, monkeypatch, before=False)
    with raises(OptionInvalid, match="frozen already"):
        freeze(site, STUDY)
    assert len(load_frozen(site, STUDY).images) == 6
    assert len([one for one in entries_of(site) if one.kind == "frozen"]) == 1


def test_what_comes_later_stops_no_study(site: Site) -> None:
    """Another issuer's patient of the same number, another's copy, a row before its image."""
    before = load_frozen(site, STUDY)
    stored = pydicom.dcmread(_file(site))
    write_dicom(
        site.dicom / "issuer.dcm", radiograph(70), bits_stored=12, patient_id=MRN,
        elements={"IssuerOfPatientID": "elsewhere"},
    )  # fmt: skip
    stored.PatientID = "LATE"
    stored.save_as(site.dicom / "copy.dcm")
    with site.labels.open("a") as file:
        file.write("LATE,nodule\nNOT-YET,nodule\n")
    assert load_frozen(site, STUDY).patients == before.patients
    other = STUDY.model_copy(update={"study": STUDY.study.model_copy(update={"name": "other"})})
    with pytest.raises(LabelsInvalid, match="several patients share"):
        load_frozen(site, other)


def test_a_later_examination_does_not_contradict_an_earlier_one(tmp_path: Path) -> None:
    write_site(tmp_path, 6, 1)
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    before = load_frozen(site, STUDY)
    later = write_dicom(site.dicom / "late.dcm", radiograph(70), bits_stored=12, patient_id=MRN)
    with site.labels.open("a") as file:
        file.write(f"{later},nodule\n")
    assert load_frozen(site, STUDY).patients == before.patients


def test_images_that_come_later_do_not_fill_the_memory(tmp_path: Path) -> None:
    write_site(tmp_path, 4, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    large = STUDY.model_copy(update={"input": STUDY.input.model_copy(update={"size": 512})})
    load_frozen(site, large)

    def peak() -> int:
        tracemalloc.start()
        load_frozen(site, large)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    alone = peak()
    for number in range(24):
        write_dicom(site.dicom / f"{number}.dcm", radiograph(100 + number), bits_stored=12)
    # Decoded, then from the cache; each is 1 MiB as a tensor.
    assert max(peak(), peak()) < alone + (6 << 20)


def test_a_study_frozen_by_another_preprocessing_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessing_digest, "SPEC_LABEL", b"cloister/preprocess/v2\0")
    with raises(DataChanged, match="preprocesses images differently"):
        load_frozen(site, STUDY)
    freeze(site, STUDY, again=True, why="a new version")
    load_frozen(site, STUDY)


def test_a_line_that_a_kill_cut_short_is_no_damage(site: Site) -> None:
    with path_of(site).open("ab") as file:
        file.write(b'{"kind": "fro')
    load_frozen(site, STUDY)
    freeze(site, STUDY, again=True, why="x")
    assert "recovered" in [one.kind for one in entries_of(site)]


def test_the_line_that_names_a_manifest_is_signed(site: Site) -> None:
    kinds = [one.kind for one in entries_of(site)]
    assert kinds[kinds.index("frozen") + 1] == "signed"


def test_a_manifest_tells_of_no_patient_and_is_private(site: Site) -> None:
    path = manifests.path_of(site, STUDY)
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "MRN" not in text
    assert "nodule" not in text
    items = json.loads(text)["body"]["items"]
    assert len(items) == 6
    for kind in ("image", "file", "pixels", "label"):
        assert len({item[kind] for item in items}) == 6, kind
    assert _patient(site) in {item["patient"] for item in items}


@pytest.mark.parametrize("damage", ["edit", "cut", "other key", "gone", "older"])
def test_a_manifest_that_is_not_the_signed_one_is_refused(
    site: Site, tmp_path: Path, damage: str
) -> None:
    path = manifests.path_of(site, STUDY)
    text = path.read_text()
    if damage == "edit":
        path.write_text(text.replace(_patient(site), "0" * 64))
    elif damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "other key":
        other = init_site(tmp_path / "other", name="site")
        body = json.loads(text)["body"]
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        signature = other.identity().sign(manifests._LABEL, canonical).hex()
        path.write_text(json.dumps({"body": body, "signature": signature}))
    elif damage == "gone":
        path.unlink()
    else:
        write_dicom(site.dicom / "late.dcm", radiograph(70), bits_stored=12, patient_id=MRN)
        freeze(site, STUDY, again=True, why="a late image")
        load_frozen(site, STUDY)
        path.write_text(text)
    with raises(DataChanged, match="does not match this site's signature"):
        load_frozen(site, STUDY)


def test_freezing_anew_needs_a_reason_and_is_logged(site: Site) -> None:
    for options in (
        {},
        {"again": True},
        {"again": True, "why": "two\nlines"},
        {"again": True, "why": "\u00e9" * 501},
    ):
        with raises(OptionInvalid):
            freeze(site, STUDY, **options)  # type: ignore[arg-type]
    _flip_pixel(site)
    freeze(site, STUDY, again=True, why="sent again by the archive")
    load_frozen(site, STUDY)
    noted = [one.body for one in entries_of(site) if one.kind == "frozen"]
    assert [one["why"] for one in noted] == ["", "sent again by the archive"]
    assert [one["images"] for one in noted] == [6, 6]
    assert noted[0]["sha256"] != noted[1]["sha256"]


def test_a_manifest_that_is_gone_cannot_be_made_anew_without_a_word(site: Site) -> None:
    manifests.path_of(site, STUDY).unlink()
    with raises(OptionInvalid, match="frozen already"):
        freeze(site, STUDY)
    freeze(site, STUDY, again=True, why="restored without it")
    load_frozen(site, STUDY)


@pytest.mark.parametrize("again", [False, True])
def test_killed_between_manifest_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    write_site(tmp_path, 6, 1, key="PatientID")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    if again:
        load_frozen(site, STUDY)
        _flip_pixel(site)
    with monkeypatch.context() as patched:
        patched.setattr(manifests, "_note", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            freeze(site, STUDY, again=again, why="x" if again else "")
    if again:
        # The log knows of the first alone, so the second does not count.
        with raises(DataChanged, match="does not match this site's signature"):
            load_frozen(site, STUDY)
        freeze(site, STUDY, again=True, why="x")
    load_frozen(site, STUDY)
    frozen = [one for one in entries_of(site) if one.kind == "frozen"]
    assert len(frozen) == 1 + again
    load_frozen(site, STUDY)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_data_with_faults_are_not_frozen(tmp_path: Path) -> None:
    site = init_site(tmp_path / "empty", name="site")
    site.dicom.mkdir()
    with raises(SiteEmpty):
        load_frozen(site, STUDY)
    assert not manifests.path_of(site, STUDY).exists()


@pytest.mark.parametrize("words", [("no", "pneumothorax"), ("a", "b" * 200)])
def test_the_length_of_sealed_labels_counts_nobody(words: tuple[str, str]) -> None:
    """From 1 of 100 on: that there is one at all, a word longer than all others may tell."""
    key, study = bytes(32), "ab" * 32
    lengths = set()
    for positive in (1, 2, 37, 100):
        cells = {
            (f"{number:064x}", "cd" * 32): ("id", words[number < positive]) for number in range(100)
        }
        sealed = seal_labels(key, study, cells)
        assert open_labels(key, study, sealed) == cells
        lengths.add(len(sealed))
    assert len(lengths) == 1
