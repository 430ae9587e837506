"""DICOM header: the elements that are read; all others are dropped before a library sees them.

``parse_tags`` receives a data set that holds nothing but the wanted elements (``structure``), so
neither a patient's name nor a private block can turn up in a warning or an exception.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from cloister_fl.client.dicom import geometry
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.errors import Reject

WANTED = frozenset(
    (
        0x00080005,  # Specific Character Set
        0x00080016,  # SOP Class UID
        0x00080018,  # SOP Instance UID
        0x00080020,  # Study Date
        0x00080050,  # Accession Number
        0x00080060,  # Modality
        0x00080070,  # Manufacturer
        0x00100020,  # Patient ID
        0x00100021,  # Issuer of Patient ID
        0x00100040,  # Patient's Sex
        0x00101010,  # Patient's Age
        0x00280002,  # Samples per Pixel
        0x00280004,  # Photometric Interpretation
        0x00280008,  # Number of Frames
        0x00280010,  # Rows
        0x00280011,  # Columns
        0x00280100,  # Bits Allocated
        0x00280101,  # Bits Stored
        0x00280102,  # High Bit
        0x00280103,  # Pixel Representation
        0x00280120,  # Pixel Padding Value
        0x00280121,  # Pixel Padding Range Limit
        0x00280301,  # Burned In Annotation
        0x00281050,  # Window Center
        0x00281051,  # Window Width
        0x00281052,  # Rescale Intercept
        0x00281053,  # Rescale Slope
        0x00281056,  # VOI LUT Function
        0x00283000,  # Modality LUT Sequence
        0x00283010,  # VOI LUT Sequence
        0x0020000D,  # Study Instance UID
        # Where a slice lies; see ``geometry``.
        0x0020000E,  # Series Instance UID
        0x00200032,  # Image Position (Patient)
        0x00200037,  # Image Orientation (Patient)
        0x00200052,  # Frame of Reference UID
        0x00280030,  # Pixel Spacing
    )
)
_NAME, _BIRTH_DATE = 0x00100010, 0x00100030
ASIDE = frozenset((_NAME, _BIRTH_DATE))
"""Elements that tell whether two patient identifiers are one person's. They are hashed as they
stand: no library decodes them, and the name goes no further."""

_DATE = re.compile(r"[0-9]{8}")  # PS3.5 section 6.2, DA
_AGE = re.compile(r"([0-9]{1,3})([DWMY]?)")  # PS3.5 section 6.2, AS; some write no unit
_A_YEAR = {"D": 365, "W": 52, "M": 12, "Y": 1, "": 1}
_OLDEST = 130
SEXES = ("F", "M", "O")  # PS3.3 C.7.1.1
_UNREAD = "\ufffd"
"""What pydicom puts where bytes are no characters of the stated character set."""


@dataclass(frozen=True, eq=False)
class Lut:
    """A look-up table (PS3.3 C.11.1.1, C.11.2.1.1).

    Attributes:
        first: input value of the first entry.
        bits: bits of an entry, 8 to 16.
        values: the entries, float64, at least one.
    """

    first: int
    bits: int
    values: NDArray[np.float64]


@dataclass(frozen=True)
class PixelLayout:
    """The image pixel description (PS3.3 C.7.6.3), as far as decoding needs it."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool


@dataclass(frozen=True, eq=False)
class Grayscale:
    """How stored values become shades of grey (PS3.3 C.11.1, C.11.2, C.7.5.1.1.2).

    Attributes:
        inverted: MONOCHROME1, the lowest value is white.
        slope, intercept: rescale of the modality LUT; 1 and 0 where none is given.
        modality_lut: in place of the rescale, or None.
        padding: inclusive range of stored values that are no image, or None.
        window: centre and width of the first window, or None.
        function: VOI LUT Function: LINEAR, LINEAR_EXACT or SIGMOID.
        voi_lut: the first VOI look-up table, or None.
    """

    inverted: bool
    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: Lut | None = None
    padding: tuple[int, int] | None = None
    window: tuple[float, float] | None = None
    function: str = "LINEAR"
    voi_lut: Lut | None = None


@dataclass(frozen=True, eq=False)
class Tags:
    """What is kept of a header. Identifiers stay out of ``repr``.

    Attributes:
        year: of the study, four digits, or empty.
        sex: F, M or O, or empty.
        age: whole years, "0" to "130", or empty.
        place: where a slice of CT or MR lies.
    """

    sop_class: str
    modality: str
    manufacturer: str
    year: str
    photometric: str
    samples: int
    frames: int
    burned_in: str
    layout: PixelLayout
    grayscale: Grayscale
    sop_instance: str = field(repr=False)
    accession: str = field(repr=False)
    patient_id: str = field(repr=False)
    issuer: str = field(repr=False)
    study_instance: str = field(default="", repr=False)
    sex: str = field(default="", repr=False)
    age: str = field(default="", repr=False)
    place: geometry.Place = field(default=geometry.Place(), repr=False)


def person(aside: Mapping[int, bytes]) -> str:
    """Hash a patient's name and date of birth: 64 hexadecimal digits; empty where one is missing.

    Case, punctuation and the order of a name's parts do not count: they differ between devices.
    """
    name = sorted(re.findall(rb"[^\s^=,.\0-]+", aside.get(_NAME, b"").lower()))
    born = aside.get(_BIRTH_DATE, b"").strip(b"\0 ").replace(b".", b"")
    if not name or not _DATE.fullmatch(born.decode("ascii", "replace")):
        return ""
    return hashlib.sha256(b"\0".join((born, *name))).hexdigest()


@contextmanager
def silence() -> Iterator[None]:
    """Keep a library's warnings from being shown or logged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse_tags(header: bytes, implicit: bool) -> Tags:
    """Read the wanted elements.

    Args:
        header: a data set of wanted elements only, little endian; see ``structure.Parts``.
        implicit: whether it is encoded with implicit VR.

    Raises:
        RejectedFile: ``PIXEL_FORMAT`` for a missing or unreadable pixel description,
            ``TRUNCATED`` for an unreadable other element.
    """
    try:
        with silence():
            data_set = read_dataset(BytesIO(header), implicit, True)
            return _read(data_set)
    except RejectedFile:
        raise
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        raise RejectedFile(Reject.TRUNCATED) from None


def _read(data_set: Dataset) -> Tags:
    layout = PixelLayout(
        rows=_integer(data_set, "Rows"),
        columns=_integer(data_set, "Columns"),
        bits_allocated=_integer(data_set, "BitsAllocated"),
        bits_stored=_integer(data_set, "BitsStored"),
        high_bit=_integer(data_set, "HighBit"),
        signed=_integer(data_set, "PixelRepresentation") == 1,
    )
    if _integer(data_set, "PixelRepresentation") not in (0, 1):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    photometric = _text(data_set, "PhotometricInterpretation")
    patient, issuer = _whole(data_set, "PatientID"), _whole(data_set, "IssuerOfPatientID")
    if _UNREAD in patient + issuer:
        # What its character set does not decode may be another's number: it is nobody's.
        patient = ""
    return Tags(
        sop_class=_text(data_set, "SOPClassUID"),
        modality=_text(data_set, "Modality"),
        manufacturer=_text(data_set, "Manufacturer"),
        year=_year(data_set),
        photometric=photometric,
        samples=_integer(data_set, "SamplesPerPixel", 1),
        frames=_integer(data_set, "NumberOfFrames", 1),
        burned_in=_text(data_set, "BurnedInAnnotation").upper(),
        layout=layout,
        grayscale=_grayscale(data_set, layout, photometric == "MONOCHROME1"),
        sop_instance=_text(data_set, "SOPInstanceUID"),
        accession=_whole(data_set, "AccessionNumber"),
        patient_id=patient,
        issuer=issuer,
        study_instance=geometry.uid(_text(data_set, "StudyInstanceUID")),
        sex=_sex(data_set),
        age=_age(data_set),
        place=_place(data_set),
    )


def _place(data_set: Dataset) -> geometry.Place:
    if _text(data_set, "Modality") not in geometry.PLACED:
        return geometry.Place()
    return geometry.Place(
        series=geometry.uid(_text(data_set, "SeriesInstanceUID")),
        frame=geometry.uid(_text(data_set, "FrameOfReferenceUID")),
        position=_decimals(data_set, "ImagePositionPatient", 3),
        orientation=_decimals(data_set, "ImageOrientationPatient", 6),
        pixel_spacing=_decimals(data_set, "PixelSpacing", 2),
    )


def _decimals(data_set: Dataset, keyword: str, count: int) -> str:
    try:
        return geometry.text_of([float(one) for one in data_set.get(keyword) or ()], count)
    except (TypeError, ValueError, OverflowError):
        return ""


def _year(data_set: Dataset) -> str:
    date = _text(data_set, "StudyDate")
    return date[:4] if _DATE.fullmatch(date) else ""


def _sex(data_set: Dataset) -> str:
    word = _text(data_set, "PatientSex").upper()
    return word if word in SEXES else ""


def _age(data_set: Dataset) -> str:
    """Return the years that were lived, of 045Y, 018M, 006W, 012D; a number alone is of years."""
    told = _AGE.fullmatch(_text(data_set, "PatientAge").upper())
    if told is None:
        return ""
    years = int(told[1]) // _A_YEAR[told[2]]
    return str(years) if years <= _OLDEST else ""


def _grayscale(data_set: Dataset, layout: PixelLayout, inverted: bool) -> Grayscale:
    centre, width = _number(data_set, "WindowCenter"), _number(data_set, "WindowWidth")
    slope, intercept = _number(data_set, "RescaleSlope"), _number(data_set, "RescaleIntercept")
    if slope == 0:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    return Grayscale(
        inverted=inverted,
        slope=1.0 if slope is None else slope,
        intercept=0.0 if intercept is None else intercept,
        modality_lut=_lut(data_set, "ModalityLUTSequence", signed=layout.signed),
        padding=_padding(data_set, layout),
        window=None if centre is None or width is None else (centre, width),
        function=_text(data_set, "VOILUTFunction").upper() or "LINEAR",
        # Its input is what the modality transform puts out, negative where a rescale makes it so.
        voi_lut=_lut(data_set, "VOILUTSequence", signed=layout.signed or (intercept or 0) < 0),
    )


def _first(data_set: Dataset, keyword: str) -> Any:
    """Return an element's first value, or None where it is absent or empty."""
    value = data_set.get(keyword)
    if isinstance(value, str | bytes) or not hasattr(value, "__getitem__"):
        return value
    return value[0] if len(value) else None


def _whole(data_set: Dataset, keyword: str) -> str:
    """Return an element's text with all that it holds, also where a backslash stands in it.

    DICOM separates values with it. Of a number by which people are told apart, the first value
    alone would make one of all people whose numbers differ behind it.
    """
    value = data_set.get(keyword)
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return _text(data_set, keyword)
    return "\\".join(map(str, value)).strip("\0 \t\r\n")


def _text(data_set: Dataset, keyword: str) -> str:
    value = _first(data_set, keyword)
    return "" if value is None else str(value).strip("\0 \t\r\n")


def _integer(data_set: Dataset, keyword: str, default: int | None = None) -> int:
    value = _first(data_set, keyword)
    if value is None or value == "":
        value = default
    if value is None:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    return int(value)


def _number(data_set: Dataset, keyword: str) -> float | None:
    value = _first(data_set, keyword)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RejectedFile(Reject.PIXEL_FORMAT) from None
    if not math.isfinite(number):
        raise RejectedFile(Reject.PIXEL_FORMAT)
    return number


def _padding(data_set: Dataset, layout: PixelLayout) -> tuple[int, int] | None:
    """Return the padding range as stored values (PS3.3 C.7.5.1.1.2)."""
    value = _numbers(data_set, "PixelPaddingValue")[:1]
    if not value:
        return None
    limit = _numbers(data_set, "PixelPaddingRangeLimit")[:1]
    ends = [_as_stored(end, layout) for end in value + limit]
    return min(ends), max(ends)


def _numbers(data_set: Dataset, keyword: str) -> list[int]:
    """Return the whole numbers of an element whose VR is US or SS.

    With implicit VR nothing says which of the two, and pydicom leaves the bytes as they are.
    """
    value = data_set.get(keyword)
    if value is None:
        return []
    if isinstance(value, bytes):
        return [int(number) for number in np.frombuffer(value, "<u2")]
    return [int(value)] if isinstance(value, int) else [int(number) for number in value]


def _as_stored(value: int, layout: PixelLayout) -> int:
    """Mend a padding value that was written with the other signedness, as many devices do."""
    if not 1 <= layout.bits_stored <= 16:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    span = 1 << layout.bits_stored
    value %= span
    return value - span if layout.signed and value >= span // 2 else value


def _lut(data_set: Dataset, keyword: str, *, signed: bool) -> Lut | None:
    """Read the first item of a sequence of look-up tables.

    Args:
        signed: whether the input values of the table can be negative.
    """
    items = data_set.get(keyword)
    if not items:
        return None
    item = items[0]
    descriptor = _numbers(item, "LUTDescriptor")
    data = item.get("LUTData")
    if data is None or len(descriptor) != 3:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    # The descriptor is US or SS by the sign of the table's input; the count and the bits are
    # never negative, and 65536 entries are written as 0 (C.11.1.1.1).
    count, bits = descriptor[0] % 65536 or 65536, descriptor[2]
    first = descriptor[1] % 65536
    if signed and first >= 32768:
        first -= 65536
    values = _lut_values(data, count)
    if not 8 <= bits <= 16 or values.size != count:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    return Lut(first, bits, values.astype(np.float64))


def _lut_values(data: Any, count: int) -> NDArray[np.uint16]:
    if isinstance(data, bytes):
        if len(data) in (count, count + count % 2) and len(data) != 2 * count:
            return np.frombuffer(data, "<u1", count=count).astype(np.uint16)
        return np.frombuffer(data, "<u2").astype(np.uint16)
    entries = [data] if isinstance(data, int) else [int(entry) for entry in data]
    return (np.asarray(entries, dtype=np.int64) % 65536).astype(np.uint16)
