"""DICOM Segmentations (PS3.3 A.51): which pixels of which images a segment marks.

Runs in a worker process. highdicom reads the functional groups, which say what each frame belongs
to; it is given only the elements named here, after the same walk over the bytes as any image.

Of the images that a segmentation names, each gets a mask: an image without a frame is one in which
nothing is marked, for writers leave empty frames out. The mask is brought to the study's size as
the image is, by area, and holds a pixel that is marked by half or more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Protocol

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from cloister_fl.client.dicom import geometry, mask_table, structure
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.header import WANTED, Tags, parse_tags, silence
from cloister_fl.client.dicom.masks import segmentation_known_answer
from cloister_fl.client.dicom.pixels.preprocess import WHITE, area_resize
from cloister_fl.client.dicom.rejection import SEGMENTATION, RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_OUT_BYTES, MAX_PIXELS
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE
from cloister_fl.errors import Reject
from cloister_fl.system.text import is_blank, segment_name

_ELEMENTS = WANTED | {
    0x00081115,  # Referenced Series Sequence
    0x00081200,  # Studies Containing Other Referenced Instances Sequence
    0x0020000D,  # Study Instance UID
    0x00209221,  # Dimension Organization Sequence
    0x00209222,  # Dimension Index Sequence
    0x00209311,  # Dimension Organization Type
    0x00620001,  # Segmentation Type
    0x00620002,  # Segment Sequence
    0x00620013,  # Segments Overlap
    0x52009229,  # Shared Functional Groups Sequence
    0x52009230,  # Per-Frame Functional Groups Sequence
}
_MOST_PARSED = 60_000
"""Most elements of one sequence; a frame's functional groups have about thirty."""
_AT_ONCE = 16
"""Frames that are read in one go, so that few of them are in memory unpacked."""
_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5 section 9.1


class Asked(Protocol):
    """What is read of a segmentation; see ``ipc.Request``."""

    @property
    def size(self) -> int: ...

    @property
    def segment(self) -> str: ...


def read_segmentation(data: bytes, asked: Asked) -> tuple[Facts, mask_table.Table]:
    """Read one segmentation.

    Args:
        data: the whole file, whose preamble has been judged.
        asked: the study's segment, and the side of its images.

    Returns:
        What is known of the file, under the modality ``SEG``; and its masks, see there.

    Raises:
        RejectedFile: ``PIXEL_FORMAT`` for anything but one bit a pixel, ``SEGMENT`` where it does
            not have the segment, ``SEGMENTATION`` where it does not tell which images it marks, and
            as for an image.
    """
    parts = structure.dissect(data, _ELEMENTS, NATIVE, most_parsed=_MOST_PARSED)
    if parts.pixels is None:
        raise RejectedFile(Reject.NO_PIXELS)
    tags = parse_tags(parts.header, parts.implicit)
    if tags.sop_class != SEGMENTATION:
        raise RejectedFile(Reject.SOP_CLASS)
    if is_blank(tags.patient_id):
        raise RejectedFile(Reject.NO_PATIENT)
    if not _UID.fullmatch(tags.sop_instance):
        raise RejectedFile(Reject.TRUNCATED)
    _format(tags, len(parts.pixels))
    try:
        with silence():
            opened = _opened(parts)
            if str(opened.get("SegmentationType")) != "BINARY":
                raise RejectedFile(Reject.PIXEL_FORMAT)
            place = _place(opened)
            found = _marked(opened, asked.segment)
            marked = sum(frame is not None for frame, _ in found.values())
            if mask_table.longest(asked.size, len(found), marked) > MAX_OUT_BYTES:
                raise RejectedFile(Reject.TOO_LARGE)
            table = mask_table.pack(
                {
                    uid: mask_table.Marking(
                        None if frame is None else resized(frame, asked.size), position
                    )
                    for uid, (frame, position) in found.items()
                }
            )
    except RejectedFile:
        raise
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        # highdicom raises what Python has where a sequence is not as it expects.
        raise RejectedFile(Reject.SEGMENTATION) from None
    facts = Facts(
        rows=tags.layout.rows,
        columns=tags.layout.columns,
        pixels=hashlib.sha256(table.tobytes()).hexdigest(),
        modality=mask_table.MODALITY,
        manufacturer=tags.manufacturer,
        year=tags.year,
        sop_instance=tags.sop_instance,
        accession=tags.accession,
        patient_id=tags.patient_id,
        issuer=tags.issuer,
        person="",
        frame=place.frame,
        orientation=place.orientation,
        pixel_spacing=place.pixel_spacing,
    )
    return facts, table


@dataclass(frozen=True)
class _Known:
    """What is asked of the known segmentation."""

    size: int
    segment: str


def sound() -> bool:
    """Whether the known segmentation is read as it should be, at its own size and at another."""
    try:
        opened = _opened(structure.dissect(segmentation_known_answer.file(), _ELEMENTS, NATIVE))
        found = _marked(opened, segmentation_known_answer.SEGMENT)
        known = segmentation_known_answer.masks()
        read_segmentation(
            segmentation_known_answer.file(), _Known(16, segmentation_known_answer.SEGMENT)
        )
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        return False
    return found.keys() == known.keys() and all(
        frame is not None and np.array_equal(frame, known[uid]) for uid, (frame, _) in found.items()
    )


def _format(tags: Tags, length: int) -> None:
    layout = tags.layout
    if tags.samples != 1 or layout.rows < 1 or layout.columns < 1 or tags.frames < 1:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    pixels = layout.rows * layout.columns * tags.frames
    if pixels > MAX_PIXELS:
        raise RejectedFile(Reject.TOO_LARGE)
    if (layout.bits_allocated, layout.bits_stored, layout.high_bit) != (1, 1, 0):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    expected = -(-pixels // 8)
    if length < expected:
        raise RejectedFile(Reject.TRUNCATED)
    if length > expected + expected % 2:
        raise RejectedFile(Reject.PIXEL_FORMAT)


def _opened(parts: structure.Parts) -> Any:
    """Hand the elements to highdicom; it is not typed here, for what it gives was in the file."""
    data_set: Dataset = read_dataset(BytesIO(parts.header), parts.implicit, True)
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = UID(parts.transfer_syntax)
    data_set.add_new(structure.PIXEL_DATA, "OB", parts.pixels)
    return highdicom.seg.Segmentation.from_dataset(data_set, copy=False)


@dataclass(frozen=True)
class _Frame:
    """What one frame of the wanted segments says of itself.

    Attributes:
        image: SOP Instance UID of the image that it marks.
        position: Image Position (Patient), as ``geometry.text_of``.
    """

    image: str
    position: str


def _marked(segmentation: Any, segment: str) -> dict[str, tuple[NDArray[np.bool_] | None, str]]:
    """What a segment marks, (rows, columns) by SOP Instance UID of the image, and the position.

    None for an image that has no frame, or in whose frame nothing is marked.
    """
    wanted = _numbers(segmentation, segment)
    named = dict.fromkeys(str(uid) for _, _, uid in segmentation.get_source_image_uids())
    if not named or not all(_UID.fullmatch(uid) for uid in named):
        raise RejectedFile(Reject.SEGMENTATION)
    positions: dict[str, str] = {}
    for frame in _frames(segmentation, wanted):
        if frame.image not in named or positions.get(frame.image, frame.position) != frame.position:
            raise RejectedFile(Reject.SEGMENTATION)
        positions[frame.image] = frame.position
    found: dict[str, tuple[NDArray[np.bool_] | None, str]] = dict.fromkeys(named, (None, ""))
    uids = list(positions)
    for start in range(0, len(uids), _AT_ONCE):
        some = uids[start : start + _AT_ONCE]
        frames = segmentation.get_pixels_by_source_instance(
            some,
            segment_numbers=sorted(wanted),
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
            skip_overlap_checks=True,
            dtype=np.uint8,
        ).any(axis=3)
        for uid, frame in zip(some, frames, strict=True):
            if frame.any():
                found[uid] = frame, positions[uid]
    return found


def _numbers(segmentation: Any, segment: str) -> frozenset[int]:
    """The numbers of the segments that go by this name (Segment Number, PS3.3 C.8.20.4)."""
    numbers = [int(one.SegmentNumber) for one in segmentation.SegmentSequence]
    if len(set(numbers)) != len(numbers) or min(numbers) < 1:
        raise RejectedFile(Reject.SEGMENTATION)
    wanted = segment_name(segment)
    found = frozenset(
        number
        for number, one in zip(numbers, segmentation.SegmentSequence, strict=True)
        if wanted in (segment_name(str(name)) for name in _names(one))
    )
    if not found:
        raise RejectedFile(Reject.SEGMENT)
    return found


def _frames(segmentation: Any, wanted: frozenset[int]) -> Iterator[_Frame]:
    """Read what the frames of the wanted segments belong to.

    highdicom takes a frame that it cannot place for one of another image, and what was drawn on it
    for nothing. So every frame has to say its segment, and one of a wanted segment its one image.

    Raises:
        RejectedFile: ``SEGMENTATION`` where one does not.
    """
    shared, *more = segmentation.get("SharedFunctionalGroupsSequence") or [Dataset()]
    per_frame = segmentation.PerFrameFunctionalGroupsSequence
    if more or len(per_frame) != int(segmentation.NumberOfFrames):
        raise RejectedFile(Reject.SEGMENTATION)
    described = {int(one.SegmentNumber) for one in segmentation.SegmentSequence}
    for own in per_frame:
        (identified,) = _items(shared, own, "SegmentIdentificationSequence")
        number = int(identified.ReferencedSegmentNumber)
        if number not in described:
            raise RejectedFile(Reject.SEGMENTATION)
        if number not in wanted:
            continue
        (source,) = (
            source
            for derived in _items(shared, own, "DerivationImageSequence")
            for source in derived.get("SourceImageSequence") or []
        )
        laid = str(source.get("SpatialLocationsPreserved") or "YES") == "YES"
        if not laid or source.get("ReferencedFrameNumber") not in (None, 1):
            raise RejectedFile(Reject.SEGMENTATION)
        planes = _items(shared, own, "PlanePositionSequence")
        told = [_decimals(plane.get("ImagePositionPatient"), 3) for plane in planes]
        yield _Frame(str(source.ReferencedSOPInstanceUID), told[0] if len(told) == 1 else "")


def _place(segmentation: Any) -> geometry.Place:
    """How all its frames lie, empty where it does not tell.

    Raises:
        RejectedFile: ``SEGMENTATION`` where frames differ.
    """
    groups = [
        *(segmentation.get("SharedFunctionalGroupsSequence") or []),
        *(segmentation.get("PerFrameFunctionalGroupsSequence") or []),
    ]

    def told(sequence: str, keyword: str, count: int) -> str:
        found = {
            _decimals(one.get(keyword), count)
            for group in groups
            for one in group.get(sequence) or []
        }
        if len(found) > 1:
            raise RejectedFile(Reject.SEGMENTATION)
        return found.pop() if found else ""

    return geometry.Place(
        frame=geometry.uid(str(segmentation.get("FrameOfReferenceUID") or "")),
        orientation=told("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        pixel_spacing=told("PixelMeasuresSequence", "PixelSpacing", 2),
    )


def _items(shared: Dataset, own: Dataset, sequence: str) -> list[Dataset]:
    return list(own.get(sequence) or shared.get(sequence) or [])


def _decimals(values: Iterable[Any] | None, count: int) -> str:
    return geometry.text_of([float(one) for one in values or ()], count)


def _names(segment: Dataset) -> list[object]:
    kinds = segment.get("SegmentedPropertyTypeCodeSequence") or []
    return [segment.get("SegmentLabel", ""), *(kind.get("CodeMeaning", "") for kind in kinds)]


def resized(marked: NDArray[np.bool_], size: int) -> mask_table.Mask:
    """Bring a mask (rows, columns) to (size, size), uint8: 1 where half of it or more is marked."""
    shares = area_resize(np.where(marked, WHITE, 0).astype(np.uint16), size)
    return (shares > WHITE // 2).astype(np.uint8)
