"""A site's images with their segmentation masks: joined, frozen, cached, shown to the steward."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from cloister_fl.client.data.cohort import split
from cloister_fl.client.data.loading import load_cohort, load_frozen, read_cohort
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.contact_sheet import contact_sheet
from cloister_fl.client.training.sampling import Bag, pixels_of, targets_of
from cloister_fl.errors import (
    CohortTooSmall,
    DataChanged,
    LabelMissing,
    LabelsInvalid,
    LabelWithoutImage,
    Reject,
)
from support.dicom import make_dicom, radiograph
from support.errors import Expected, is_of, raises
from support.segmentations import saved, segment, segmentation
from support.segmented_site import (
    SPEC,
    STUDY,
    by_area,
    image,
    mask,
    uid_of,
    write,
    written,
)

pytestmark = pytest.mark.process


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write(tmp_path)
    return init_site(
        tmp_path,
        name="site",
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=5),
    )


def test_a_cohort_has_the_outline_of_each_image(tmp_path: Path) -> None:
    marked = write(tmp_path)
    site = init_site(
        tmp_path,
        name="site",
        policy=Policy(patients_at_most=1_000, min_patients=1, min_patients_per_class=5),
    )
    # Whoever read the folder without an eye on masks has turned the segmentations away.
    plain = read_cohort(site, STUDY, require_labels=False)
    assert dict(plain.rejects) == {Reject.SOP_CLASS: 12}
    reading = read_cohort(site, STUDY)
    assert not reading.faults
    assert reading.files == 24
    cohort = reading.cohort
    assert cohort is not None
    assert (cohort.targets.shape, cohort.targets.dtype) == ((12, 24, 24), np.uint8)
    assert sorted(one.label for one in cohort.patients) == [0, 1, 1, 1, 1, 1]
    wanted = {
        image_(name): by_area(box, 24).tobytes()
        for name, box in zip(_pixels(tmp_path), marked.values(), strict=True)
    }
    for pixels, marking in zip(cohort.images, cohort.targets, strict=True):
        assert wanted[pixels.tobytes()] == marking.tobytes()
    ours, held = split(cohort, 0.4)
    assert len(held.targets) == len(held.images) == 12 - len(ours.targets)
    # A second reading opens nothing and decodes nothing.
    again = load_cohort(site, STUDY)
    assert np.array_equal(again.targets, cohort.targets)


def _pixels(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "dicom").iterdir() if "seg" not in path.name)


def image_(path: Path) -> bytes:
    from cloister_fl.client.dicom.acceptance import precheck
    from cloister_fl.client.dicom.image import read_image

    return read_image(precheck(path.read_bytes(), SPEC.modalities), SPEC)[1].tobytes()


def test_nothing_plain_of_an_outline_lies_on_the_disk(site: Site) -> None:
    load_frozen(site, STUDY)
    cohort = load_cohort(site, STUDY)
    plain = {np.packbits(mask).tobytes()[:40] for mask in cohort.targets if mask.any()}
    plain |= {mask.tobytes()[200:300] for mask in cohort.targets if mask[9:12].any()}
    plain |= {b"MRN0", b"2.25.", b"lungs"}
    assert len(plain) > 10
    files = [path for path in site.root.rglob("*") if path.is_file()]
    # The folder of the images is the hospital's own.
    ours = [path for path in files if not path.is_relative_to(site.dicom)]
    assert len(ours) > 24
    for path in ours:
        content = path.read_bytes()
        assert not any(each in content for each in plain), path.name


def test_the_steward_sees_what_is_marked(site: Site) -> None:
    told = render(inspect(site, STUDY))
    assert "labels      nothing marked 1, lungs 5 (patients)" in told
    assert "The data can be used." in told
    cohort = load_cohort(site, STUDY)
    shown = Image.open(io.BytesIO(contact_sheet(cohort, STUDY.task)[1]))
    plain = Image.open(
        io.BytesIO(contact_sheet(load_cohort(site, STUDY, require_labels=False), STUDY.task)[1])
    )
    whiter = np.asarray(shown).astype(int) - np.asarray(plain)
    assert whiter.min() == 0
    assert (np.asarray(shown)[whiter > 0] == 255).all()
    assert (whiter > 0).any()


def _one(site: Site, name: str) -> Path:
    return site.dicom / name


def _another_patient(site: Site) -> None:
    source = _one(site, "1-0.dcm").read_bytes()
    theirs = image("MRN00000", 10)
    file = segmentation([source], mask(10))
    file.PatientID = dcmread(io.BytesIO(theirs)).PatientID
    _one(site, "1-0-seg.dcm").write_bytes(saved(file))


def _another_size(site: Site) -> None:
    source = _one(site, "1-0.dcm").read_bytes()
    small = make_dicom(
        radiograph(3, 24, 20), patient_id="MRN00001", bits_stored=12,
        elements={"SOPInstanceUID": uid_of(source)},
    )  # fmt: skip
    _one(site, "1-0-seg.dcm").write_bytes(segment([small], mask(3, 24, 20)))


def _two_for_one(site: Site) -> None:
    source = _one(site, "1-0.dcm").read_bytes()
    _one(site, "zz.dcm").write_bytes(segment([source], mask(3), name="another"))


def test_a_copy_of_a_segmentation_is_a_duplicate(site: Site) -> None:
    (site.dicom / "copy.dcm").write_bytes(_one(site, "1-0-seg.dcm").read_bytes())
    reading = read_cohort(site, STUDY)
    assert not reading.faults
    assert dict(reading.rejects) == {Reject.DUPLICATE: 1}
    assert reading.files == 25


def _none(site: Site) -> None:
    _one(site, "1-0-seg.dcm").unlink()


def _orphan(site: Site) -> None:
    _one(site, "zz.dcm").write_bytes(segment([image("MRN77777", 77)], mask(3)))


def _few(site: Site) -> None:
    for name in ("1-0", "1-1"):
        source = _one(site, f"{name}.dcm").read_bytes()
        _one(site, f"{name}-seg.dcm").write_bytes(written(source, np.zeros((1, 48, 40), bool)))


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (_another_patient, LabelsInvalid, "of another patient than the images that it marks"),
        (_another_size, LabelsInvalid, "of another size than the images that it marks"),
        (_two_for_one, LabelsInvalid, "the second one for the same image"),
        (_none, LabelMissing, "1 image has no segmentation mask"),
        (_orphan, LabelWithoutImage, "1 segmentation belongs to no image"),
        (_few, CohortTooSmall, "'lungs' has 4"),
    ],
)
def test_what_does_not_fit_is_listed_without_a_patients_data(
    site: Site, spoil: Callable[[Site], None], error: Expected, told: str
) -> None:
    spoil(site)
    faults = read_cohort(site, STUDY).faults
    assert any(is_of(one, error) for one in faults)
    text = "\n".join(str(one) for one in faults)
    assert told in text
    assert "MRN" not in text
    assert "2.25." not in text
    with raises(error):
        load_cohort(site, STUDY)


def test_a_mask_that_changes_after_freezing_is_named(site: Site) -> None:
    load_frozen(site, STUDY)
    # Images that come later, with what marks them, disturb nobody.
    late = image("MRN00001", 99)
    _one(site, "late.dcm").write_bytes(late)
    _one(site, "late-seg.dcm").write_bytes(segment([late], mask(99)))
    assert len(load_frozen(site, STUDY).images) == 12
    source = _one(site, "1-0.dcm").read_bytes()
    other = mask(10)
    other[0, -3:, -3:] = True
    _one(site, "1-0-seg.dcm").write_bytes(segment([source], other))
    with raises(DataChanged, match="its label changed") as caught:
        load_frozen(site, STUDY)
    named = pseudonym(site.pseudonym_key(), STUDY.digest, "", "MRN00001")
    assert f"of patient {named[:12]}: its label changed" in str(caught.value)
    assert str(caught.value).count("of patient") == 1


def test_a_byte_of_a_cached_mask_is_named(site: Site) -> None:
    load_frozen(site, STUDY)
    named = pseudonym(site.pseudonym_key(), STUDY.digest, "", "MRN00001")
    entries = sorted(site.cache.iterdir())
    assert len(entries) == 24
    hits = 0
    for entry in entries:
        data = entry.read_bytes()
        entry.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with raises(DataChanged, match="its cached pixels were altered") as caught:
            load_frozen(site, STUDY)
        hits += named[:12] in str(caught.value)
    assert hits == 4


def test_a_mask_moves_with_its_image() -> None:
    rng = np.random.default_rng(1)

    class Both:
        images = rng.integers(0, 2, (3, 32, 32)).astype(np.uint16) * 65535
        targets = (images == 65535).astype(np.uint8)
        patients = ()

    moves = np.array([[1, 2, -1], [0, -2, 2], [1, 0, 1]])
    bag = Bag(np.arange(3), moves)
    seen, wanted = pixels_of(Both(), [bag]), targets_of(STUDY.task, Both(), [bag])
    assert wanted.shape == (3, 1, 32, 32)
    assert np.array_equal((seen > 0).numpy(), wanted.numpy() == 1)
    assert not np.array_equal(wanted[:, 0].numpy(), Both.targets)
