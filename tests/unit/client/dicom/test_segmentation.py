"""DICOM Segmentations become masks of the images that they mark, or are turned away."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset

from cloister_fl.client.dicom import mask_table
from cloister_fl.client.dicom.masks import segmentation as reader
from cloister_fl.client.dicom.masks import segmentation_known_answer
from cloister_fl.client.dicom.rejection import SEGMENTATION, RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.dicom.sandbox.worker_process import SEGMENTATION_WORKER
from cloister_fl.errors import (
    DecoderUnfit,
    Reject,
)
from support.segmentations import saved, segment, segmentation
from support.segmented_site import (
    SPEC,
    by_area,
    image,
    mask,
    slices,
    uid_of,
)

pytestmark = pytest.mark.process


POSITIONS = ("", "1.0\\-2.5\\3.25", "0.0\\0.0\\0.0")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(1, module=SEGMENTATION_WORKER)
    yield made
    made.close()


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
