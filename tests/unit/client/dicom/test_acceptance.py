"""What is turned away before a decoder sees it, and with which reason."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
)

from cloister_fl.client.dicom import acceptance, file_finder, structure
from cloister_fl.client.dicom.acceptance import Checked
from cloister_fl.client.dicom.file_finder import read_file
from cloister_fl.client.dicom.header import ASIDE, WANTED
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.errors import FolderUnreadable, Reject
from support.dicom import SIZED, encode, make_dicom, radiograph, sample

ALL = ("CR", "DX", "MG", "CT", "MR")
CAPTURE, ULTRASOUND = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.6.1"


def _reason(data: bytes, modalities: tuple[str, ...] = ALL) -> Reject | None:
    try:
        acceptance.precheck(data, modalities)
    except RejectedFile as rejected:
        return rejected.reason
    return None


def _check(data: bytes) -> Checked:
    return acceptance.precheck(data, ALL)


@pytest.mark.parametrize("modality", ALL)
@pytest.mark.parametrize("transfer_syntax", sorted(NATIVE))
def test_sound_files_pass(modality: str, transfer_syntax: str) -> None:
    checked = _check(make_dicom(modality=modality, transfer_syntax=transfer_syntax))
    assert checked.tags.modality == modality
    assert checked.tags.patient_id == "P1"
    assert checked.pixels == radiograph().astype("<u2").tobytes()


@pytest.mark.parametrize("burned_in", ["YES", "NO", ""])
def test_an_ultrasound_is_held_with_and_without_the_tag(burned_in: str) -> None:
    data = make_dicom(
        elements={
            "SOPClassUID": ULTRASOUND, "Modality": "US", "BurnedInAnnotation": burned_in
        }
    )  # fmt: skip
    assert _reason(data, ("US",)) is Reject.CAPTURE
    assert acceptance.precheck(data, ("US",), released=True).tags.modality == "US"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"elements": {"BurnedInAnnotation": "YES"}}, Reject.BURNED_IN),
        ({"modality": "MG", "without": ["BurnedInAnnotation"]}, Reject.BURNED_IN),
        ({"elements": {"SOPClassUID": CAPTURE}}, Reject.CAPTURE),
        ({"preamble": bytes(127) + b"\1"}, Reject.PREAMBLE),
    ],
)
def test_what_is_held_can_be_released_and_nothing_else(
    options: dict[str, Any], reason: Reject
) -> None:
    data = make_dicom(**options)
    assert _reason(data) is reason
    assert reason.held
    assert acceptance.precheck(data, ALL, released=True).pixels == radiograph().tobytes()
    held = {one for one in Reject if one.held}
    assert held == {Reject.BURNED_IN, Reject.CAPTURE, Reject.PREAMBLE}


def test_a_release_does_not_let_other_faults_pass() -> None:
    for options in ({"elements": {"NumberOfFrames": 2}}, {"without": ["PatientID"]}):
        with pytest.raises(RejectedFile):
            acceptance.precheck(make_dicom(**options), ALL, released=True)


@pytest.mark.parametrize("preamble", [b"II*\0", b"MM\0*"])
def test_dual_tiff_passes(preamble: bytes) -> None:
    assert _reason(make_dicom(preamble=preamble.ljust(128, b"\1"))) is None


@pytest.mark.parametrize("preamble", [b"MZ", b"\x7fELF", b"<html>", b"PK\3\4", b"\0" * 127 + b"x"])
def test_other_preambles(preamble: bytes) -> None:
    assert _reason(make_dicom(preamble=preamble.ljust(128, b"\0"))) is Reject.PREAMBLE


@pytest.mark.parametrize(
    ("keyword", "field"),
    [
        ("PatientID", "patient_id"),
        ("IssuerOfPatientID", "issuer"),
        ("AccessionNumber", "accession"),
    ],
)
def test_a_number_is_read_whole(keyword: str, field: str) -> None:
    """A backslash ends a value in DICOM; the first alone would be many people's, or many rows'."""
    data = make_dicom(elements={keyword: "A\\1"})
    assert getattr(acceptance.precheck(data, ALL).tags, field) == "A\\1"


@pytest.mark.parametrize("data", [b"", b"hello", bytes(132), b"\x89PNG" + bytes(500), b"DICM"])
def test_not_dicom(data: bytes) -> None:
    assert _reason(data) is Reject.NOT_DICOM


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"elements": {"SOPClassUID": CAPTURE, "BurnedInAnnotation": "NO"}}, Reject.CAPTURE),
        ({"elements": {"SOPClassUID": CAPTURE, "Modality": "OT"}}, Reject.MODALITY),
        ({"elements": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.4"}}, Reject.SOP_CLASS),
        ({"elements": {"SOPClassUID": ULTRASOUND}}, Reject.MODALITY),
        ({"without": ["SOPClassUID"]}, Reject.SOP_CLASS),
        ({"elements": {"Modality": "US"}}, Reject.MODALITY),
        ({"elements": {"Modality": "CT"}}, Reject.MODALITY),
        ({"without": ["Modality"]}, Reject.MODALITY),
        ({"without": ["PatientID"]}, Reject.NO_PATIENT),
        ({"elements": {"PatientID": "  "}}, Reject.NO_PATIENT),
        ({"without": ["SOPInstanceUID"]}, Reject.TRUNCATED),
        ({"elements": {"BurnedInAnnotation": "YES"}}, Reject.BURNED_IN),
        ({"modality": "MG", "elements": {"BurnedInAnnotation": "YES"}}, Reject.BURNED_IN),
        ({"modality": "MG", "without": ["BurnedInAnnotation"]}, Reject.BURNED_IN),
        ({"without": ["PixelData"]}, Reject.NO_PIXELS),
        # A treatment plan: no pixels, and so no description of them.
        (
            {
                "without": ["PixelData", "Rows", "Columns", "BitsAllocated"],
                "elements": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.5"},
            },
            Reject.NO_PIXELS,
        ),
        ({"elements": {"NumberOfFrames": 2}}, Reject.FRAMES),
        ({"elements": {"NumberOfFrames": 0}}, Reject.FRAMES),
        ({"elements": {"SamplesPerPixel": 3}}, Reject.COLOUR),
        ({"elements": {"PhotometricInterpretation": "RGB"}}, Reject.COLOUR),
        ({"elements": {"PhotometricInterpretation": "PALETTE COLOR"}}, Reject.COLOUR),
        ({"elements": {"Rows": 65535, "Columns": 65535}}, Reject.TOO_LARGE),
        ({"elements": {"Rows": 0}}, Reject.PIXEL_FORMAT),
        ({"without": ["Rows"]}, Reject.PIXEL_FORMAT),
        ({"without": ["PixelRepresentation"]}, Reject.PIXEL_FORMAT),
        ({"elements": {"PixelRepresentation": 2}}, Reject.PIXEL_FORMAT),
        ({"elements": {"BitsAllocated": 32}}, Reject.PIXEL_FORMAT),
        ({"elements": {"BitsAllocated": 12}}, Reject.PIXEL_FORMAT),
        ({"elements": {"BitsStored": 17, "HighBit": 16}}, Reject.PIXEL_FORMAT),
        ({"elements": {"BitsStored": 0}}, Reject.PIXEL_FORMAT),
        ({"elements": {"HighBit": 15}}, Reject.PIXEL_FORMAT),
        ({"elements": {"RescaleSlope": 0, "RescaleIntercept": 0}}, Reject.PIXEL_FORMAT),
        ({"elements": {"Rows": 49}}, Reject.TRUNCATED),
        ({"elements": {"Rows": 47}}, Reject.PIXEL_FORMAT),
    ],
)
def test_reasons(options: dict[str, Any], reason: Reject) -> None:
    assert _reason(make_dicom(**options)) is reason


@pytest.mark.parametrize("modality", ["CR", "DX", "CT", "MR"])
def test_absent_annotation_passes_where_none_is_expected(modality: str) -> None:
    assert _reason(make_dicom(modality=modality, without=["BurnedInAnnotation"])) is None


def test_modality_that_the_study_does_not_read() -> None:
    assert _reason(make_dicom(modality="CT"), ("CR", "DX")) is Reject.MODALITY


@pytest.mark.parametrize(
    "uid", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.100", "1.2.3"]
)
def test_transfer_syntax_that_is_not_listed(uid: str) -> None:
    data = make_dicom()
    known = b"UI\x14\x001.2.840.10008.1.2.1\0"
    assert known in data
    value = uid.encode() + b"\0" * (len(uid) % 2)
    other = data.replace(known, b"UI" + struct.pack("<H", len(value)) + value)
    assert _reason(other) is Reject.TRANSFER_SYNTAX


@pytest.mark.parametrize("transfer_syntax", sorted(TRANSFER_SYNTAXES))
def test_cut_anywhere(transfer_syntax: str) -> None:
    pixels, bits = sample(transfer_syntax)
    data = make_dicom(pixels, bits_stored=bits, transfer_syntax=transfer_syntax)
    assert _reason(data) is None
    for end in range(140, len(data) - 1, 41):
        assert _reason(data[:end]) is not None


def test_cut_in_the_pixels_is_called_truncated() -> None:
    assert _reason(make_dicom()[:-100]) is Reject.TRUNCATED


@pytest.mark.parametrize("transfer_syntax", SIZED)
def test_codestream_cut_inside_a_whole_file(transfer_syntax: str) -> None:
    pixels, bits = sample(transfer_syntax)
    frame = encode(pixels, transfer_syntax, bits)
    for kept in (frame[:-2], frame[: len(frame) * 3 // 4]):
        data = make_dicom(pixels, bits_stored=bits, transfer_syntax=transfer_syntax, encoded=kept)
        assert _reason(data) is Reject.TRUNCATED


def test_element_that_claims_more_than_is_there() -> None:
    head = struct.pack("<HH", 0x7FE1, 0x1010) + b"OB\0\0"
    assert _reason(make_dicom() + head + struct.pack("<I", 10) + bytes(10)) is None
    assert _reason(make_dicom() + head + struct.pack("<I", 4_000_000_000)) is Reject.TRUNCATED


def test_appended_archive() -> None:
    assert _reason(make_dicom() + b"PK\3\4" + b"x" * 60) is Reject.TRUNCATED
    assert _reason(make_dicom() + bytes(512)) is None


def test_undefined_lengths_that_never_end() -> None:
    data = make_dicom(without=["PixelData"])
    for vr in (b"SQ", b"UN", b"OB"):
        tail = struct.pack("<HH", 0x0029, 0x1010) + vr + b"\0\0" + b"\xff" * 4
        assert _reason(data + tail) is Reject.TRUNCATED
        assert _reason(data + tail + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") is Reject.TRUNCATED


def _nested(depth: int) -> bytes:
    head = struct.pack("<HH", 0x0029, 0x1010) + b"SQ\0\0" + b"\xff" * 4
    item = b"\xfe\xff\x00\xe0" + b"\xff" * 4
    end = b"\xfe\xff\x0d\xe0" + bytes(4) + b"\xfe\xff\xdd\xe0" + bytes(4)
    return (head + item) * depth + end * depth


def test_nesting_is_bounded() -> None:
    data = make_dicom(without=["PixelData"])
    assert _reason(data + _nested(50)) is Reject.NO_PIXELS
    assert _reason(data + _nested(structure.MAX_DEPTH + 1)) is Reject.TRUNCATED
    assert _reason(data + _nested(20_000)) is Reject.TRUNCATED


def test_items_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "MAX_ELEMENTS", 500)
    data = make_dicom(without=["PixelData"])
    head = struct.pack("<HH", 0x0029, 0x1010) + b"SQ\0\0" + b"\xff" * 4
    empty = b"\xfe\xff\x00\xe0" + bytes(4)
    end = b"\xfe\xff\xdd\xe0" + bytes(4)
    assert _reason(data + head + empty * 100 + end) is Reject.NO_PIXELS
    assert _reason(data + head + empty * 600 + end) is Reject.TRUNCATED


def test_an_element_twice() -> None:
    data = make_dicom()
    element = struct.pack("<HH", 0x0010, 0x0020) + b"LO\x02\x00P2"
    assert _reason(data + element) is Reject.TRUNCATED


def test_private_and_personal_elements_never_reach_the_parser() -> None:
    data_set_bytes = make_dicom(
        elements={"PatientName": "CANARY^NAME", "PatientBirthDate": "19700101"}
    )
    parts = structure.dissect(data_set_bytes, WANTED, TRANSFER_SYNTAXES.keys(), ASIDE)
    assert b"CANARY" in data_set_bytes
    assert b"CANARY" not in parts.header
    assert b"19700101" not in parts.header
    assert parts.aside == {0x00100010: b"CANARY^NAME ", 0x00100030: b"19700101"}


def _person(name: str, born: str = "19700101") -> str:
    return _check(make_dicom(elements={"PatientName": name, "PatientBirthDate": born})).person


def test_a_person_is_told_by_name_and_birth_whatever_the_device_writes() -> None:
    one = _person("Doe^Jane")
    assert len(one) == 64
    assert {_person("DOE^JANE"), _person("jane doe"), _person("Doe, Jane^^^")} == {one}
    others = [_person("Doe^John"), _person("Doe^Jane", "19700102"), _person("Doe")]
    assert one not in others
    assert len(set(others)) == 3
    assert {_person(""), _person("Doe^Jane", ""), _person("Doe^Jane", "1970")} == {""}


@pytest.mark.parametrize(
    ("sex", "age", "told"),
    [
        ("F", "045Y", ("F", "45")),
        ("m ", "017Y", ("M", "17")),
        ("O", "018M", ("O", "1")),
        ("F", "103W", ("F", "1")),
        ("F", "364D", ("F", "0")),
        # Public sets write years without their unit.
        ("M", "51", ("M", "51")),
        ("M", "148Y", ("M", "")),
        ("male", "Y45", ("", "")),
        ("F\\M", "045Y\\046Y", ("F", "45")),
        ("", "", ("", "")),
    ],
)
def test_sex_and_age_are_read_and_nothing_else_becomes_them(
    sex: str, age: str, told: tuple[str, str]
) -> None:
    tags = _check(make_dicom(elements={"PatientSex": sex, "PatientAge": age})).tags
    assert (tags.sex, tags.age) == told
    assert "45" not in repr(tags)


def test_year_and_maker_are_read() -> None:
    tags = _check(make_dicom(elements={"StudyDate": "20190304", "Manufacturer": "Maker"})).tags
    assert (tags.year, tags.manufacturer) == ("2019", "Maker")
    assert _check(make_dicom(elements={"StudyDate": ""})).tags.year == ""


@pytest.mark.parametrize("transfer_syntax", sorted(NATIVE))
def test_look_up_tables_and_padding_are_read(transfer_syntax: str) -> None:
    item = Dataset()
    item.LUTDescriptor = [3, 65534, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = [0, 30000, 65535]
    item["LUTData"].VR = "US"
    pixels = radiograph().astype(np.int16)
    checked = _check(
        make_dicom(
            pixels,
            transfer_syntax=transfer_syntax,
            elements={"VOILUTSequence": Sequence([item]), "PixelPaddingValue": -2000},
        )
    )
    lut = checked.tags.grayscale.voi_lut
    assert lut is not None
    assert (lut.first, lut.bits, lut.values.tolist()) == (-2, 16, [0, 30000, 65535])
    assert checked.tags.grayscale.padding == (-2000, -2000)


def test_windows_and_rescale_are_read() -> None:
    tags = _check(
        make_dicom(
            elements={
                "WindowCenter": [40, 300],
                "WindowWidth": [400, 1500],
                "RescaleSlope": "2.5",
                "RescaleIntercept": "-1024",
                "VOILUTFunction": "SIGMOID",
                "PixelPaddingValue": 5,
                "PixelPaddingRangeLimit": 2,
            }
        )
    ).tags.grayscale
    assert tags.window == (40.0, 400.0)
    assert (tags.slope, tags.intercept, tags.function) == (2.5, -1024.0, "SIGMOID")
    assert tags.padding == (2, 5)


def test_codestream_of_another_size_never_reaches_a_decoder() -> None:
    for transfer_syntax in SIZED:
        pixels, bits = sample(transfer_syntax, rows=64, columns=64)
        data = make_dicom(
            pixels,
            bits_stored=bits,
            transfer_syntax=transfer_syntax,
            elements={"Rows": 32},
        )
        assert _reason(data) is Reject.PIXEL_FORMAT


@pytest.mark.parametrize(
    ("claimed", "actual"),
    [
        (JPEGLossless, JPEGExtended12Bit),
        (JPEGExtended12Bit, JPEGLossless),
        (JPEGLSLossless, JPEG2000Lossless),
        (JPEG2000, JPEGLSLossless),
        (RLELossless, JPEGLossless),
    ],
)
def test_codestream_of_another_coding(claimed: str, actual: str) -> None:
    frame = encode(radiograph(), actual, 12)
    data = make_dicom(transfer_syntax=claimed, encoded=frame)
    assert _reason(data) in (Reject.DECODE_FAILED, Reject.PIXEL_FORMAT)


def test_colour_and_tiled_codestreams() -> None:
    image = radiograph(rows=80, columns=80)
    frame = bytearray(encode(image, JPEG2000Lossless, 12))
    tiny = bytearray(frame)
    tiny[24:32] = struct.pack(">II", 1, 1)
    three = bytearray(frame)
    three[40:42] = b"\0\3"
    shifted = bytearray(frame)
    shifted[16:20] = struct.pack(">I", 4)
    for wrong, reason in (
        (tiny, Reject.TOO_LARGE),
        (three, Reject.COLOUR),
        (shifted, Reject.PIXEL_FORMAT),
    ):
        data = make_dicom(
            image,
            bits_stored=12,
            transfer_syntax=JPEG2000Lossless,
            encoded=bytes(wrong),
        )
        assert _reason(data) is reason


def test_fragments_are_joined() -> None:
    frame = encode(radiograph(), JPEGLSLossless, 12)
    data = make_dicom(
        transfer_syntax=JPEGLSLossless,
        elements={"PixelData": encapsulate([frame], fragments_per_frame=4)},
    )
    assert _check(data).pixels.rstrip(b"\0") == frame.rstrip(b"\0")


SOUND = make_dicom(transfer_syntax=JPEGLSLossless)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_judged_and_never_raises(data: st.DataObject) -> None:
    wrong = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        wrong[data.draw(st.integers(128, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    _reason(bytes(wrong))


def test_discover_order_links_and_odd_things(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "b" / "c").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "b" / "c" / "2", root / "b" / "1", root / "a", outside / "secret"):
        path.write_text("x")
    (root / "DICOMDIR").write_text("x")
    (root / "inside").symlink_to(root / "a")
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(outside)
    (root / "out-file").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(root / "none")
    os.mkfifo(root / "pipe")
    found = file_finder.discover(root)
    assert [(one.path.name, one.reason) for one in found] == [
        ("a", None),
        ("1", None),
        ("2", None),
        ("dangling", Reject.UNREADABLE),
        ("out", Reject.OUTSIDE_ROOT),
        ("out-file", Reject.OUTSIDE_ROOT),
        ("pipe", Reject.UNREADABLE),
    ]
    assert "secret" not in repr(found)


def test_discover_without_a_folder(tmp_path: Path) -> None:
    (tmp_path / "CANARY").write_text("x")
    for name in ("CANARY", "missing"):
        with pytest.raises(FolderUnreadable) as caught:
            file_finder.discover(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
        assert "CANARY" not in str(caught.value)


def test_discover_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "sub").mkdir()
        # Root may read everything, so where the tests run as root they give that up for a while.
        root.chmod(0o755)
        (root / "sub").chmod(0)
        user = os.geteuid()
        try:
            os.seteuid(65534 if user == 0 else user)
            assert [one.reason for one in file_finder.discover(root)] == [Reject.UNREADABLE]
            with pytest.raises(FolderUnreadable):
                file_finder.discover(root / "sub")
        finally:
            os.seteuid(user)
            (root / "sub").chmod(0o700)


def test_read_file_refuses_links_pipes_and_giants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file") == b"12345"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(file_finder, "MAX_FILE_BYTES", 4)
    for name, reason in (
        ("link", Reject.UNREADABLE),
        ("pipe", Reject.UNREADABLE),
        ("none", Reject.UNREADABLE),
        ("file", Reject.TOO_LARGE),
    ):
        with pytest.raises(RejectedFile) as caught:
            read_file(tmp_path / name)
        assert caught.value.reason is reason


class _Unjudged:
    """An entry of which the file system says nothing."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def is_symlink(self) -> bool:
        raise PermissionError


def test_an_entry_that_cannot_be_judged_is_turned_away_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sound.dcm").write_bytes(b"x")
    honest = file_finder._entries
    bad = _Unjudged(str(tmp_path.resolve() / "bad"), "bad")
    monkeypatch.setattr(file_finder, "_entries", lambda folder: [*honest(folder), bad])
    found = file_finder.discover(tmp_path)
    assert [(one.path.name, one.reason) for one in found] == [
        ("bad", Reject.UNREADABLE), ("sound.dcm", None),
    ]  # fmt: skip
