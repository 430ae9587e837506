"""DICOM Segmentations become masks of the images that they mark, or are turned away."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset

from cloister_fl.client.data.cohort import split
from cloister_fl.client.data.loading import load_cohort, load_frozen, read_cohort
from cloister_fl.client.dicom import mask_table
from cloister_fl.client.dicom.masks import segmentation as reader
from cloister_fl.client.dicom.masks import segmentation_known_answer
from cloister_fl.client.dicom.rejection import SEGMENTATION, RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.dicom.sandbox.worker_process import SEGMENTATION_WORKER
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site, pseudonym
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.contact_sheet import contact_sheet
from cloister_fl.client.training.sampling import Bag, pixels_of, targets_of
from cloister_fl.errors import (
    CohortTooSmall,
    DataChanged,
    DecoderUnfit,
    LabelMissing,
    LabelsInvalid,
    LabelWithoutImage,
    Reject,
)
from support.dicom import make_dicom, radiograph
from support.errors import Expected, is_of, raises
from support.segmentations import saved, segment, segmentation
from support.segmented_site import SPEC, STUDY, Mask, image, mask, slices, uid_of, write, written

pytestmark = pytest.mark.process


POSITIONS = ("", "1.0\\-2.5\\3.25", "0.0\\0.0\\0.0")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(1, module=SEGMENTATION_WORKER)
    yield made
    made.close()


def by_area(marked: Mask, size: int) -> NDArray[np.uint8]:
    """1 where half of the area or more is marked, by a count on the finest common grid."""
    rows, columns = marked.shape
    fine = marked.repeat(size, axis=0).repeat(size, axis=1)
    share = fine.reshape(size, rows, size, columns).mean(axis=(1, 3))
    return (share >= 0.5).astype(np.uint8)


def read(pool: Pool, file: bytes, name: str = "lungs") -> dict[str, mask_table.Mask]:
    facts, table = pool.submit(file, SPEC, segment=name).result(60)
    assert facts.modality == "SEG"
    return unpack(table, SPEC.size)


def unpack(table: mask_table.Table, size: int) -> dict[str, mask_table.Mask]:
    found = mask_table.Masks(table, size)
    return {uid: found.whole(found.marking(uid)) for uid in found.uids}


def refused(pool: Pool, file: bytes, name: str = "lungs") -> Reject:
    with pytest.raises(RejectedFile) as caught:
        pool.submit(file, SPEC, segment=name).result(60)
    return caught.value.reason


def test_a_mask_covers_what_the_image_covers(pool: Pool) -> None:
    source, marked = image(), mask()
    found = read(pool, segment([source], marked))
    assert found.keys() == {uid_of(source)}
    assert np.array_equal(found[uid_of(source)], by_area(marked[0], 24))
    assert 0 < found[uid_of(source)].sum() < 24 * 24


def test_every_slice_of_a_series_has_a_mask_and_one_without_a_frame_an_empty_one(
    pool: Pool,
) -> None:
    sources = slices(20)
    marked = np.concatenate([mask(k) for k in range(20)])
    marked[[0, 3, 19]] = False
    file = segment(sources, marked)
    assert dcmread(io.BytesIO(file)).NumberOfFrames == 17
    found = read(pool, file)
    for source, each in zip(sources, marked, strict=True):
        assert np.array_equal(found[uid_of(source)], by_area(each, 24))


@pytest.mark.parametrize("transfer_syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_a_segment_goes_by_its_label_or_its_kind(pool: Pool, transfer_syntax: str) -> None:
    source = image()
    both = np.zeros((1, 48, 40, 2), np.uint8)
    both[0, 4:20, 4:16, 0] = 1
    both[0, 4:20, 24:36, 1] = 1
    file = segment([source], both, labels=("Left", "right "), transfer_syntax=transfer_syntax)
    left, right = (by_area(both[0, :, :, k] == 1, 24) for k in (0, 1))
    for name, wanted in (
        ("left", left), ("RIGHT", right), ("Lung Structure", left | right)
    ):  # fmt: skip
        assert np.array_equal(read(pool, file, name)[uid_of(source)], wanted), name
    assert refused(pool, file, "heart") is Reject.SEGMENT


def _changed(change: Callable[[Dataset], None]) -> bytes:
    file = segmentation(slices(2), np.concatenate([mask(), mask(1)]))
    change(file)
    return saved(file)


def _fractional(_: Dataset) -> Dataset:
    return segmentation([image()], mask().astype(np.float32), kind="FRACTIONAL")


def _without(keyword: str) -> Callable[[Dataset], None]:
    return lambda file: delattr(file, keyword)


def _no_source(file: Dataset) -> None:
    for frame in file.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


def _many_frames(file: Dataset) -> None:
    file.NumberOfFrames = 1 << 16


def _short(file: Dataset) -> None:
    file.PixelData = file.PixelData[:100]


def _long(file: Dataset) -> None:
    file.PixelData += bytes(2)


def _moved(file: Dataset) -> None:
    for frame in file.PerFrameFunctionalGroupsSequence[1:]:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.SpatialLocationsPreserved == "YES"
        source.SpatialLocationsPreserved = "REORIENTED_ONLY"


def _lost(uid: str | None) -> Callable[[Dataset], None]:
    """What is drawn on one frame belongs to no image, or to one that is nowhere named."""

    def change(file: Dataset) -> None:
        frame = file.PerFrameFunctionalGroupsSequence[0]
        if uid is None:
            del frame.DerivationImageSequence
        else:
            source = frame.DerivationImageSequence[0].SourceImageSequence[0]
            source.ReferencedSOPInstanceUID = uid

    return change


def _numbered(*numbers: int) -> Callable[[Dataset], None]:
    """Segments have numbers that its frames do not use, or share one."""

    def change(file: Dataset) -> None:
        (one,) = file.SegmentSequence
        file.SegmentSequence = [copy.deepcopy(one) for _ in numbers]
        for segment_, number in zip(file.SegmentSequence, numbers, strict=True):
            segment_.SegmentNumber = number

    return change


def _of_frame(number: int) -> Callable[[Dataset], None]:
    def change(file: Dataset) -> None:
        frame = file.PerFrameFunctionalGroupsSequence[0]
        frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = number

    return change


def _a_frame_too_few(file: Dataset) -> None:
    file.PerFrameFunctionalGroupsSequence.pop()


def _label_map(file: Dataset) -> None:
    file.SegmentationType = "LABELMAP"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_lost(None), Reject.SEGMENTATION),
        (_lost("2.25.99"), Reject.SEGMENTATION),
        (_numbered(5), Reject.SEGMENTATION),
        (_numbered(0), Reject.SEGMENTATION),
        (_numbered(1, 1), Reject.SEGMENTATION),
        (_of_frame(7), Reject.SEGMENTATION),
        (_a_frame_too_few, Reject.SEGMENTATION),
        (_label_map, Reject.PIXEL_FORMAT),
        (_without("PatientID"), Reject.NO_PATIENT),
        (_without("PixelData"), Reject.NO_PIXELS),
        (_without("SegmentSequence"), Reject.SEGMENTATION),
        (_without("PerFrameFunctionalGroupsSequence"), Reject.SEGMENTATION),
        (_without("ReferencedSeriesSequence"), Reject.SEGMENTATION),
        (_no_source, Reject.SEGMENTATION),
        (_moved, Reject.SEGMENTATION),
        (_many_frames, Reject.TOO_LARGE),
        (_short, Reject.TRUNCATED),
        (_long, Reject.PIXEL_FORMAT),
    ],
)
def test_what_cannot_be_laid_over_images_is_turned_away(
    pool: Pool, change: Callable[[Dataset], None], reason: Reject
) -> None:
    assert refused(pool, _changed(change)) is reason


def test_a_fractional_one_and_one_that_nobody_asked_for_are_turned_away(pool: Pool) -> None:
    fractional = saved(_fractional(Dataset()))
    assert refused(pool, fractional) is Reject.PIXEL_FORMAT
    assert refused(pool, segment([image()], mask()), "") is Reject.SOP_CLASS
    program = bytearray(segment([image()], mask()))
    program[:2] = b"MZ"
    assert refused(pool, bytes(program)) is Reject.PREAMBLE


def test_mutations_end_in_a_table_or_a_reason(pool: Pool) -> None:
    files = [segment([image()], mask()), segment(slices(3), np.concatenate([mask()] * 3))]
    rng = random.Random(8)
    reasons = set()
    for _ in range(400):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(132, len(data))
            data[at : at + rng.choice((1, 1, 2))] = rng.randbytes(rng.choice((0, 1, 2)))
        try:
            facts, table = pool.submit(bytes(data), SPEC, segment="lungs").result(60)
        except RejectedFile as rejected:
            reasons.add(rejected.reason)
        else:
            assert facts.modality == "SEG"
            assert unpack(table, SPEC.size)
    assert {Reject.TRUNCATED, Reject.SEGMENTATION} <= reasons <= set(Reject)


def test_a_library_that_reads_another_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.sound()
    wrong = segmentation_known_answer.masks()
    wrong[segmentation_known_answer.SLICES[0]][1, 1] = 1
    monkeypatch.setattr(segmentation_known_answer, "masks", lambda: wrong)
    assert not reader.sound()


def test_an_unfit_library_stops_the_reading_and_says_what(pool: Pool) -> None:
    from cloister_fl.client.dicom.sandbox import ipc

    request = ipc.Request(1, 1, ("DX",), 24, "auto", (1.0, 99.0), None, segment="lungs")
    with pytest.raises(DecoderUnfit, match="decoder of DICOM Segmentations fails"):
        ipc.parse_answer(ipc.pack_unfit(1, SEGMENTATION), request, {SEGMENTATION})


@given(
    st.dictionaries(
        st.from_regex(r"[0-9.]{1,64}", fullmatch=True),
        st.none() | st.tuples(st.integers(0, 2**32), st.sampled_from(POSITIONS)),
        min_size=1,
    ),
    st.integers(16, 40),
)
@settings(max_examples=30)
def test_a_table_comes_back_to_the_bit(told: dict[str, tuple[int, str] | None], size: int) -> None:
    given = {
        uid: mask_table.Marking()
        if one is None
        else mask_table.Marking(
            np.random.default_rng(one[0]).integers(0, 2, (size, size)).astype(np.uint8), one[1]
        )
        for uid, one in told.items()
    }
    table = mask_table.pack(given)
    marked = sum(one is not None for one in told.values())
    assert table.nbytes == mask_table.longest(size, len(given), marked)
    back = mask_table.Masks(table, size)
    assert back.uids == given.keys()
    for uid, one in given.items():
        found = back.marking(uid)
        assert found.position == one.position
        assert (found.mask is None) == (one.mask is None)
        assert one.mask is None or np.array_equal(found.mask, one.mask)
        assert back.whole(found).shape == (size, size)


def test_a_table_that_a_captured_worker_made_up_is_refused() -> None:
    whole = mask_table.Marking(np.ones((16, 16), np.uint8), "1.0\\2.0\\3.0")
    table = mask_table.pack({"1.2": whole, "1.3": whole, "1.4": mask_table.Marking()})
    assert len(unpack(table, 16)) == 3
    twice, nameless, named, many, none, more = (table.copy() for _ in range(6))
    twice[0, 4:36] = twice[0, 36:68]
    nameless[0, 4:36] = 0
    named[0, 4] = 0x4141
    many[0, 2] = 4
    none[0, 0] = none[0, 2] = 0
    more[0, 1] = 0xFFFF
    for one in (twice, nameless, named, many, none, more, table[:, 1:], table[:, :3], table[:0]):
        with pytest.raises(mask_table.InvalidTable):
            unpack(one, 16)


# At a site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write(tmp_path)
    return init_site(tmp_path, name="site", policy=Policy(min_patients_per_class=5))


def test_a_cohort_has_the_outline_of_each_image(tmp_path: Path) -> None:
    marked = write(tmp_path)
    site = init_site(tmp_path, name="site", policy=Policy(min_patients_per_class=5))
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
