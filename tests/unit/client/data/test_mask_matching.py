"""Masks lie where their images lie, are the patient's own, and touch no other patient's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.loading import load_cohort, load_frozen, read_cohort
from cloister_fl.client.dicom import read_ahead
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import LabelsInvalid, Reject
from support.segmentations import saved, segment, segmentation
from support.segmented_site import STUDY, image, mask, slices, uid_of, write, written

pytestmark = pytest.mark.process


COUNT = 6


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A patient with a series of CT, and one segmentation of all of it."""
    (tmp_path / "dicom").mkdir()
    made = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    for number, source in enumerate(slices(COUNT)):
        (made.dicom / f"{number}.dcm").write_bytes(source)
    put(made, segmented())
    return made


def segmented() -> Dataset:
    return segmentation(slices(COUNT), np.concatenate([mask(k) for k in range(COUNT)]))


def put(site: Site, file: Dataset) -> None:
    (site.dicom / "seg.dcm").write_bytes(saved(file))


def _turned(file: Dataset) -> None:
    planes = file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    planes[0].ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]


def _untold(file: Dataset) -> None:
    del file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence


def _coarser(file: Dataset) -> None:
    file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [3, 3]


def _elsewhere(file: Dataset) -> None:
    file.FrameOfReferenceUID = "2.25.9"


def _shifted(file: Dataset) -> None:
    for frame in file.PerFrameFunctionalGroupsSequence:
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [x, y, z + 0.5]


def _exchanged(file: Dataset) -> None:
    """The masks of two slices, each said to be of the other."""
    first, third = (file.PerFrameFunctionalGroupsSequence[place] for place in (0, 2))
    one, other = (frame.DerivationImageSequence for frame in (first, third))
    first.DerivationImageSequence = copy.deepcopy(other)
    third.DerivationImageSequence = copy.deepcopy(one)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_turned, "of another orientation than the images"),
        (_untold, "of another orientation than the images"),
        (_coarser, "of another pixel spacing than the images"),
        (_elsewhere, "of another frame of reference than the images"),
        (_shifted, "at another position than the images"),
        (_exchanged, "at another position than the images"),
    ],
)
def test_what_lies_elsewhere_is_a_fault(
    site: Site, change: Callable[[Dataset], None], told: str
) -> None:
    assert read_cohort(site, STUDY).faults == ()
    file = segmented()
    change(file)
    put(site, file)
    (fault, *_) = read_cohort(site, STUDY).faults
    assert isinstance(fault, LabelsInvalid)
    assert told in str(fault)


def test_frames_that_lie_differently_are_turned_away(site: Site) -> None:
    file = segmented()
    planes = file.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    frame = file.PerFrameFunctionalGroupsSequence[0]
    frame.PlaneOrientationSequence = copy.deepcopy(planes)
    frame.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    put(site, file)
    assert read_cohort(site, STUDY).rejects == {Reject.SEGMENTATION: 1}


def test_a_coordinate_that_was_rounded_is_the_same_place(site: Site) -> None:
    file = segmented()
    for frame in file.PerFrameFunctionalGroupsSequence:
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [x, y, f"{z + 0.004:.4f}"]
    put(site, file)
    assert read_cohort(site, STUDY).faults == ()


def _targets(cohort: Cohort | None) -> dict[str, tuple[int, bytes, bytes]]:
    """What training sees of each patient."""
    assert cohort is not None
    return {
        one.pseudonym: (
            one.label,
            cohort.images[list(one.images)].tobytes(),
            cohort.targets[list(one.images)].tobytes(),
        )
        for one in cohort.patients
    }


def _theirs(file: bytes, uid: str) -> bytes:
    """A file under another one's SOP Instance UID."""
    data_set = dcmread(io.BytesIO(file))
    data_set.SOPInstanceUID = data_set.file_meta.MediaStorageSOPInstanceUID = uid
    return saved(data_set)


def test_a_patient_who_comes_changes_nothing_of_another_s(tmp_path: Path) -> None:
    """Not even with the UIDs of another's images: a sum would move by more than one share."""
    write(tmp_path, 4)
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    before = _targets(load_cohort(site, STUDY))
    # First in the folder: what comes first is what stays of two duplicates.
    for place in range(2):
        taken = uid_of((site.dicom / f"{place}-0.dcm").read_bytes())
        new = _theirs(image("MRN00009", 90 + place), taken)
        (site.dicom / f"!{place}.dcm").write_bytes(new)
        (site.dicom / f"!{place}-seg.dcm").write_bytes(written(new, mask(90 + place)))
    third = image("MRN00009", 99)
    (site.dicom / "!2.dcm").write_bytes(third)
    # Its segmentation has the UID of an image of another patient.
    taken = uid_of((site.dicom / "2-0.dcm").read_bytes())
    (site.dicom / "!2-seg.dcm").write_bytes(_theirs(segment([third], mask(99)), taken))
    reading = read_cohort(site, STUDY)
    assert reading.faults == ()
    assert dict(reading.rejects) == {}
    after = _targets(reading.cohort)
    assert {name: after[name] for name in before} == before
    (new,) = after.keys() - before.keys()
    assert len(after[new][1]) == 3 * 24 * 24 * 2
    # So it is once the study is frozen, and for those who come then.
    load_frozen(site, STUDY)
    fourth = _theirs(image("MRN00010", 110), taken)
    (site.dicom / "!!.dcm").write_bytes(fourth)
    (site.dicom / "!!-seg.dcm").write_bytes(written(fourth, mask(110)))
    assert _targets(load_frozen(site, STUDY)) == after


@pytest.mark.slow
def test_a_segmentation_that_comes_after_freezing_disturbs_nobody(tmp_path: Path) -> None:
    write(tmp_path)
    site = init_site(
        tmp_path,
        name="site",
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=5),
    )
    frozen = _targets(load_frozen(site, STUDY))
    source = (site.dicom / "1-0.dcm").read_bytes()
    # First in the folder: another marking of a frozen image, and one of an image that is not here.
    (site.dicom / "!.dcm").write_bytes(segment([source], mask(5), name="another"))
    (site.dicom / "!!.dcm").write_bytes(segment([image("MRN00001", 77)], mask(6)))
    assert _targets(load_frozen(site, STUDY)) == frozen
    # Without the manifest both are faults.
    assert len(read_cohort(site, STUDY).faults) == 2


def test_what_other_code_has_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    site = init_site(
        tmp_path,
        name="site",
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=5),
    )
    (site.dicom / "text.dcm").write_bytes(b"no image" * 100)
    asked = []
    submit = read_ahead.Reader._submitted

    def watched(*args: object, **rest: object) -> object:
        asked.append(1)
        return submit(*args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(read_ahead.Reader, "_submitted", watched)
    load_cohort(site, STUDY)
    assert len(asked) == 25
    load_cohort(site, STUDY)
    assert len(asked) == 25
    monkeypatch.setattr(read_ahead, "_rules", lambda: "0" * 64)
    load_cohort(site, STUDY)
    assert len(asked) == 50


def test_what_is_not_marked_takes_no_room(tmp_path: Path) -> None:
    """A small file can name a thousand images that are not there."""
    (tmp_path / "dicom").mkdir()
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    sources = slices(200)
    marked = np.zeros((200, 48, 40), bool)
    marked[0] = mask()[0]
    (site.dicom / "0.dcm").write_bytes(sources[0])
    (site.dicom / "seg.dcm").write_bytes(segment(sources, marked))
    study = STUDY.model_copy(update={"input": STUDY.input.model_copy(update={"size": 512})})
    cohort = load_cohort(site, study)
    assert cohort.targets.shape == (1, 512, 512)
    assert cohort.targets.any()
    # The image, and a mask of 32 kB with 200 names of 64 bytes.
    sizes = sorted(path.stat().st_size for path in site.cache.iterdir())
    assert len(sizes) == 2
    assert sizes[0] < 50_000
    assert sizes[1] > 500_000


def test_a_finding_too_small_for_the_study_is_counted(tmp_path: Path) -> None:
    write(tmp_path)
    site = init_site(tmp_path, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))
    assert "too small" not in render(inspect(site, STUDY))
    speck: NDArray[np.bool_] = np.zeros((1, 48, 40), bool)
    speck[0, 7, 9] = True
    source = (site.dicom / "1-0.dcm").read_bytes()
    (site.dicom / "1-0-seg.dcm").write_bytes(segment([source], speck))
    told = render(inspect(site, STUDY))
    assert "too small   the segmentation mask of 1 image: empty at the study's size" in told
