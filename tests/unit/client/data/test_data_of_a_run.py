"""What a run with privacy trains on: what is there as it was frozen, each patient for itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data import loading
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.labels.label_file import read_labels, sound_labels
from cloister_fl.client.data.loading import freeze, load_for_run, read_for_check
from cloister_fl.client.dicom import read_ahead
from cloister_fl.client.preflight import findings
from cloister_fl.client.preflight.data_check import inspect
from cloister_fl.client.site.audit_log import entries_of, path_of
from cloister_fl.client.site.data_notice import FILE, data_notices, note_data, note_look
from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.approval import approve
from cloister_fl.errors import (
    CohortTooSmall,
    DataChanged,
    DecoderUnfit,
    InternalError,
    LabelMissing,
    LabelsInvalid,
    SiteEmpty,
)
from cloister_fl.tasks.classification import Classification
from support import studies
from support.ct_series import phantom, write_series
from support.damaged_data import OF_FILES, OF_LABELS, images, patient_of
from support.errors import raises
from support.federations import study, write_cohort

pytestmark = pytest.mark.process

STUDY = study()
OPEN = study(privacy="enabled = false")
FIRST = "MRN-000"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Six patients of two images each; half of them have the finding."""
    root = write_cohort(tmp_path / "north", np.random.default_rng(0), "MRN", patients=6, images=2)
    policy = Policy(patients_at_most=1_000, min_patients=1, max_epsilon_study=6)
    return init_site(root, name="north", policy=policy)


@pytest.fixture
def frozen(site: Site) -> Site:
    approve(site, STUDY, read_for_check(site, STUDY))
    return site


def _name(site: Site, patient: str) -> str:
    return pseudonym(site.pseudonym_key(), STUDY.digest, "", patient)


def _seen(cohort: Cohort) -> dict[str, tuple[int, list[bytes]]]:
    """Label and pixels by patient."""
    return {
        one.pseudonym: (one.label, [cohort.images[place].tobytes() for place in one.images])
        for one in cohort.patients
    }


def _relabelled(site: Site, was: str, is_: str) -> None:
    text = site.labels.read_text()
    assert was in text
    site.labels.write_text(text.replace(was, is_, 1))


def _first_files(site: Site) -> list[Path]:
    return [path for path in images(site) if patient_of(path) == FIRST]


def _another_s(site: Site) -> None:
    for path in _first_files(site):
        found = dcmread(path)
        found.PatientID = "MRN-001"
        found.save_as(path)


ROWS = {
    *("label changed", "no class", "no label", "long row", "no row", "two rows"),
    *("quotation mark", "no text"),
}
OF_ONE: dict[str, Callable[[Site], object]] = {
    "both images gone": lambda site: [path.unlink() for path in _first_files(site)],
    "torn": lambda site: [path.write_bytes(path.read_bytes()[:700]) for path in _first_files(site)],
    "another's": _another_s,
    "label changed": lambda site: _relabelled(site, f"{FIRST},no", f"{FIRST},yes"),
    "no class": lambda site: _relabelled(site, f"{FIRST},no", f"{FIRST},perhaps"),
    "no label": lambda site: _relabelled(site, f"{FIRST},no", f"{FIRST},"),
    "long row": lambda site: _relabelled(site, f"{FIRST},no", f"{FIRST},no,x"),
    "no row": lambda site: _relabelled(site, f"{FIRST},no\n", ""),
    "two rows": lambda site: _relabelled(site, f"{FIRST},no", f"{FIRST},no\n{FIRST},yes"),
    "quotation mark": lambda site: _relabelled(site, FIRST, f'"{FIRST}'),
    "no text": lambda site: site.labels.write_bytes(
        site.labels.read_bytes().replace(b"MRN-000", b"MRN-\xff00")
    ),
}


@pytest.mark.parametrize("first_run", ["approved", "frozen by a run"])
@pytest.mark.parametrize("how", OF_ONE)
def test_what_happens_to_one_patient_costs_that_patient_alone(
    site: Site, how: str, first_run: str
) -> None:
    if first_run == "approved":
        approve(site, STUDY, read_for_check(site, STUDY))
        before = _seen(load_for_run(site, STUDY))
        assert len(before) == 6
        assert data_notices(site.root) == {}
    else:
        before = _seen(read_for_check(site, STUDY).cohort or pytest.fail("no data"))
    OF_ONE[how](site)
    after = _seen(load_for_run(site, STUDY))
    gone = {_name(site, FIRST)}
    if how in ROWS and first_run == "approved":
        # The label is frozen, whatever the file says now.
        gone = set()
    elif how == "label changed":
        # Nobody had frozen the other label.
        gone = set()
        assert after[_name(site, FIRST)][0] == 1
        del before[_name(site, FIRST)], after[_name(site, FIRST)]
    if how == "another's" and first_run != "approved":
        gone |= {_name(site, "MRN-001")}
        assert len(after[_name(site, "MRN-001")][1]) == 4
        del after[_name(site, "MRN-001")]
    assert after == {name: one for name, one in before.items() if name not in gone}
    told = how != "label changed" or first_run == "approved"
    assert (STUDY.digest in data_notices(site.root)) is told


def test_a_patient_keeps_the_images_that_are_as_they_were(frozen: Site) -> None:
    before = _seen(load_for_run(frozen, STUDY))
    _first_files(frozen)[0].unlink()
    after = _seen(load_for_run(frozen, STUDY))
    name = _name(frozen, FIRST)
    assert len(before[name][1]) == 2
    assert len(after[name][1]) == 1
    assert after[name][1][0] in before[name][1]
    del before[name], after[name]
    assert after == before


def test_pixels_that_were_altered_in_the_cache_are_read_anew(frozen: Site) -> None:
    before = _seen(load_for_run(frozen, STUDY))
    OF_FILES["torn_cache"](frozen)
    assert _seen(load_for_run(frozen, STUDY)) == before
    assert "altered" in data_notices(frozen.root)[STUDY.digest].message
    assert _seen(load_for_run(frozen, STUDY)) == before
    assert data_notices(frozen.root) == {}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "hostile_files" else ())
        for name in (*OF_FILES, *OF_LABELS)
    ],
)
def test_no_damage_raises_or_lets_in_what_was_not_frozen(frozen: Site, name: str) -> None:
    before = _seen(load_for_run(frozen, STUDY))
    log = path_of(frozen).read_bytes()
    (OF_FILES | OF_LABELS)[name](frozen)  # type: ignore[operator]
    cohort = load_for_run(frozen, STUDY)
    assert cohort.images.shape[1:] == (32, 32)
    for patient, (label, pixels) in _seen(cohort).items():
        assert label == before[patient][0]
        assert set(pixels) <= set(before[patient][1])
    # Its head travels with the answer.
    assert path_of(frozen).read_bytes() == log


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "hostile_files" else ())
        for name in (*OF_FILES, *OF_LABELS)
    ],
)
def test_the_check_finds_what_a_run_leaves_out(frozen: Site, name: str) -> None:
    """One gate: where the check finds nothing, a run uses everything."""
    (OF_FILES | OF_LABELS)[name](frozen)  # type: ignore[operator]
    report = inspect(frozen, STUDY)
    whole = len(load_for_run(frozen, STUDY).images) == 12
    if not report.faults:
        assert whole
        assert data_notices(frozen.root) == {}
    status = findings.exit_status(findings.data(report))
    assert status == (3 if report.faults else 0)
    if not whole:
        assert status == 3
        assert STUDY.digest in data_notices(frozen.root)


def test_a_volume_that_lost_a_slice_is_not_another_volume(tmp_path: Path) -> None:
    asked = studies.study(
        input={
            "modalities": ["CT"], "size": 24, "windowing": "fixed", "window": [2048.0, 4096.0],
            "dimensions": 3, "depth": 9, "spacing": 1.0,
        },
        network={"name": "small-cnn-3d"},
    )  # fmt: skip
    for number in range(4):
        stored = phantom() + np.uint16(number)
        write_series(tmp_path / "dicom" / f"{number}", stored, patient=f"MRN{number}")
    rows = [f"MRN{number},{('normal', 'nodule')[number % 2]}" for number in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["PatientID,finding", *rows]) + "\n")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    approve(site, asked, read_for_check(site, asked))
    before = _seen(load_for_run(site, asked))
    assert len(before) == 4
    # The last slice: what is left would be a volume, a shorter one.
    files = sorted((site.dicom / "0").iterdir())
    last = max(files, key=lambda one: float(dcmread(one).ImagePositionPatient[2]))
    last.unlink()
    after = _seen(load_for_run(site, asked))
    assert len(after) == 3
    assert after.items() <= before.items()


# Data that nobody froze: a rule approved the study


def test_the_first_run_freezes_what_can_be_used(site: Site) -> None:
    whole = site.labels.read_text()
    _relabelled(site, f"{FIRST},no\n", "")
    assert len(load_for_run(site, STUDY).patients) == 5
    manifest = manifests.load(site, STUDY)
    assert manifest is not None
    assert len(manifest.items) == 10
    assert data_notices(site.root)[STUDY.digest].code == "CLO-201"
    # What can be used later was not frozen.
    site.labels.write_text(whole)
    assert len(load_for_run(site, STUDY).patients) == 5


def test_a_site_without_data_freezes_none_and_trains_on_nobody(site: Site) -> None:
    OF_FILES["no_files_and_no_labels"](site)
    cohort = load_for_run(site, STUDY)
    assert cohort.patients == ()
    assert cohort.images.shape == (0, 32, 32)
    manifest = manifests.load(site, STUDY)
    assert manifest is not None
    assert manifest.items == ()
    assert data_notices(site.root)[STUDY.digest].code == SiteEmpty.code
    # As many entries as with data.
    assert [one.kind for one in entries_of(site)] == ["frozen", "signed"]


def test_a_row_that_two_patients_share_is_each_one_s(tmp_path: Path) -> None:
    from support.dicom import radiograph, write_dicom

    for number, accession in enumerate(["A1", "A1", "A2"]):
        write_dicom(
            tmp_path / "dicom" / f"{number}.dcm", radiograph(number), bits_stored=12,
            patient_id=f"P{number}", elements={"AccessionNumber": accession},
        )  # fmt: skip
    (tmp_path / "labels.csv").write_text("AccessionNumber,finding\nA1,normal\nA2,nodule\n")
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    asked = studies.study()
    with raises(LabelsInvalid):
        freeze(site, asked)
    # It took both away, so that one patient's coming took the other along.
    key = site.pseudonym_key()
    assert {one.pseudonym: one.label for one in load_for_run(site, asked).patients} == {
        pseudonym(key, asked.digest, "", name): label
        for name, label in (("P0", 0), ("P1", 0), ("P2", 1))
    }
    assert data_notices(site.root)[asked.digest].code == LabelsInvalid.code


def test_without_privacy_all_is_as_it_was(site: Site) -> None:
    _relabelled(site, f"{FIRST},no\n", "")
    with raises(LabelMissing):
        load_for_run(site, OPEN)
    assert not manifests.is_frozen(site, OPEN)


# Faults of the program


def test_a_file_whose_reading_fails_is_turned_away_alone(
    frozen: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _first_files(frozen)[0].read_bytes()
    for path in frozen.cache.iterdir():
        path.unlink()
    (frozen.root / "index.sqlite").unlink()
    honest = read_ahead.Reader._submitted

    def unfit(self: read_ahead.Reader, data: bytes, *, released: bool) -> object:
        future = honest(self, data, released=released)
        if data == first:
            future.cancel()
            future = type(future)()
            future.set_exception(DecoderUnfit("The decoder is unfit."))
        return future

    monkeypatch.setattr(read_ahead.Reader, "_submitted", unfit)
    assert len(load_for_run(frozen, STUDY).images) == 11
    with raises(DecoderUnfit):
        read_for_check(frozen, STUDY)


def test_a_reading_that_fails_altogether_is_a_site_without_patients(
    frozen: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError("MRN-000 of Anna Sommer")

    monkeypatch.setattr(loading, "read_cohort", fails)
    assert load_for_run(frozen, STUDY).patients == ()
    notice = data_notices(frozen.root)[STUDY.digest]
    assert notice.code == InternalError.code
    assert "MemoryError" in notice.message
    assert "Sommer" not in notice.message


def test_an_altered_manifest_is_refused(frozen: Site) -> None:
    path = manifests.path_of(frozen, STUDY)
    path.write_text(path.read_text().replace('"images"', '"image"').replace("a", "b"))
    with raises(DataChanged, match="does not match this site's signature"):
        load_for_run(frozen, STUDY)
    assert [one.code for one in inspect(frozen, STUDY).faults] == ["CLO-209"]


# Notices


def test_a_notice_keeps_its_time_while_it_says_the_same(tmp_path: Path) -> None:
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Few.")])
    first = data_notices(tmp_path)["a" * 64]
    assert (first.code, first.message) == ("CLO-207", "CLO-207: Few.")
    text = (tmp_path / FILE).read_text().replace(first.time, "then")
    (tmp_path / FILE).write_text(text)
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Few.")])
    assert data_notices(tmp_path)["a" * 64].time == "then"
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Fewer.")])
    assert data_notices(tmp_path)["a" * 64].time != "then"
    note_data(tmp_path, "b" * 64, [])
    note_data(tmp_path, "a" * 64, [])
    assert data_notices(tmp_path) == {}


def test_what_failed_in_training_stays_until_a_person_looks(tmp_path: Path) -> None:
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Few.")], lasts=True)
    note_data(tmp_path, "a" * 64, [])
    assert data_notices(tmp_path)["a" * 64].lasts
    note_look(tmp_path, "a" * 64)
    assert data_notices(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "studies": [1]}'])
def test_a_file_of_notices_that_is_torn_says_nothing_and_is_written_anew(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / FILE).write_text(text)
    assert data_notices(tmp_path) == {}
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Few.")])
    assert len(data_notices(tmp_path)) == 1


def test_a_notice_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    note_data(tmp_path / "missing", "a" * 64, [CohortTooSmall("Few.")])
    (tmp_path / FILE).mkdir()
    note_data(tmp_path, "a" * 64, [CohortTooSmall("Few.")])
    assert data_notices(tmp_path) == {}


# Labels


def test_rows_behind_a_stray_quotation_mark_count(tmp_path: Path) -> None:
    """Each line is a row: one that goes on in the next could swallow another patient's."""
    path = tmp_path / "labels.csv"
    task = Classification("finding", ("no", "yes"))
    path.write_text('PatientID,finding\nA,yes\n"B,no\nC,no\nD,"yes"\n"E\n1",no\nF,yes\n')
    assert {key: row.value for (_, key), row in sound_labels(path, task).rows.items()} == {
        "A": 1, "C": 0, "D": 1, '1"': 0, "F": 1,
    }  # fmt: skip
    with raises(LabelsInvalid):
        read_labels(path, task)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_that_is_too_long_is_left_out_alone(tmp_path: Path, end: str) -> None:
    path = tmp_path / "labels.csv"
    task = Classification("finding", ("no", "yes"))
    long = "x" * (1 << 16)
    rows = ["PatientID,finding,why", f"A,yes,{long}", "B,no,x", f"C,yes,{long * 3}", "D,yes,y"]
    path.write_bytes(("\ufeff" + end.join(rows)).encode())
    found = sound_labels(path, task).rows
    assert {key: (row.line, row.value) for (_, key), row in found.items()} == {
        "B": (3, 0), "D": (5, 1),
    }  # fmt: skip
