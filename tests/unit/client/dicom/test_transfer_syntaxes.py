"""Every row of the table of transfer syntaxes has what it needs, and no other list names them."""

from __future__ import annotations

import ast
import base64
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import UID, JPEG2000Lossless, RLELossless

from cloister_fl.client.dicom import acceptance, transfer_syntaxes
from cloister_fl.client.dicom.codestream import READERS, Frame, check_codestream, read_frame
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels import decoders, known_answers
from cloister_fl.client.dicom.pixels.decoders import DECODERS, check_decoder, decode
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import (
    NATIVE,
    TRANSFER_SYNTAXES,
    UNCOMPRESSED,
    Family,
    TransferSyntax,
)
from cloister_fl.errors import DecoderUnfit, Reject
from support.dicom import ENCODERS, encode, make_dicom, sample

CLIENT = Path(transfer_syntaxes.__file__).parents[1]
PAGE = Path(__file__).parents[4] / "docs" / "dicom.md"
ROWS = list(TRANSFER_SYNTAXES.values())
ENCODED = [row for row in ROWS if row.uid not in NATIVE]


def _name(row: TransferSyntax) -> str:
    return row.name


def _layout(row: TransferSyntax) -> PixelLayout:
    wide = 8 if row.depth == 8 else 16
    rows, columns = known_answers.ROWS, known_answers.COLUMNS
    return PixelLayout(rows, columns, wide, row.depth, row.depth - 1, False)


def test_no_row_stands_twice() -> None:
    assert len(transfer_syntaxes._ROWS) == len(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(uid == row.uid for uid, row in TRANSFER_SYNTAXES.items())


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_pydicom_knows_the_row(row: TransferSyntax) -> None:
    known = UID(row.uid)
    assert known.is_transfer_syntax
    assert not known.is_private
    assert known.is_little_endian
    assert not known.is_deflated
    assert known.is_encapsulated is (row.family != UNCOMPRESSED)
    assert known.is_implicit_VR is (row.uid == transfer_syntaxes.IMPLICIT_LITTLE)


def test_what_is_native_is_what_is_not_encoded() -> None:
    assert {row.uid for row in ROWS} - {row.uid for row in ENCODED} == NATIVE
    assert sorted(NATIVE) == ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"]


@pytest.mark.parametrize("row", ENCODED, ids=_name)
def test_the_row_has_a_check_a_decoder_and_an_encoder_of_the_tests(row: TransferSyntax) -> None:
    assert row.family in READERS
    assert row.family in DECODERS
    assert row.uid in ENCODERS


@pytest.mark.parametrize("row", ENCODED, ids=_name)
def test_the_row_has_a_known_answer_that_its_decoder_meets(row: TransferSyntax) -> None:
    frame, layout = base64.b64decode(known_answers.ENCODED[row.known_answer]), _layout(row)
    check_codestream(frame, row.uid, layout)
    apart = np.abs(decode(frame, row.uid, layout) - known_answers.original(row.depth)).max()
    assert apart <= row.tolerance
    assert row.lossy is (row.tolerance > 0)


@pytest.mark.parametrize("row", ENCODED, ids=_name)
def test_a_codestream_that_has_an_end_marker_must_show_it(row: TransferSyntax) -> None:
    pixels, bits = sample(row.uid)
    ended = encode(pixels, row.uid, bits).rstrip(b"\0").endswith(b"\xff\xd9")
    assert row.family.end == (b"\xff\xd9" if ended else b"")


@pytest.mark.parametrize("uid", sorted(NATIVE))
def test_what_is_not_decoded_has_no_decoder_to_check(uid: str) -> None:
    with pytest.raises(RejectedFile) as caught:
        check_decoder(uid)
    assert caught.value.reason is Reject.TRANSFER_SYNTAX


def test_known_answers_and_families_are_those_of_the_table() -> None:
    assert {row.known_answer for row in ENCODED} == known_answers.ENCODED.keys()
    assert {row.family for row in ENCODED} == READERS.keys() == DECODERS.keys()
    assert {row.known_answer for row in ROWS if row.uid in NATIVE} == {""}


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_the_row_is_documented(row: TransferSyntax) -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    told = f"| {row.name} | `{row.uid}` | {row.family.decoder} |"
    assert told in lines, "run: python tests/support/bundled_files.py"


def test_no_other_module_of_the_client_names_one() -> None:
    found = set()
    for path in CLIENT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and node.value in TRANSFER_SYNTAXES:
                found.add(path.name)
    assert found == {"transfer_syntaxes.py"}


# What is missing of a row is refused


NEW = TransferSyntax("1.2.840.10008.1.2.4.92", "new", Family("new", "somebody"), "NEW")


def _read_all(_data: bytes, _row: TransferSyntax, layout: PixelLayout) -> Frame:
    return Frame(layout.rows, layout.columns, layout.bits_allocated)


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A row that has nothing but itself."""
    check_decoder.cache_clear()
    monkeypatch.setitem(TRANSFER_SYNTAXES, NEW.uid, NEW)
    return monkeypatch


def test_a_family_without_a_reader_is_refused(new: pytest.MonkeyPatch) -> None:
    data = make_dicom(transfer_syntax=NEW.uid, encoded=b"frame")
    for refuse in (
        lambda: acceptance.precheck(data, ("DX",)),
        lambda: read_frame(b"frame", NEW.uid, _layout(NEW)),
        lambda: check_codestream(b"frame", NEW.uid, _layout(NEW)),
    ):
        with pytest.raises(RejectedFile) as caught:
            refuse()
        assert caught.value.reason is Reject.TRANSFER_SYNTAX


def test_a_row_without_a_known_answer_is_unfit(new: pytest.MonkeyPatch) -> None:
    image = known_answers.original(12).astype("<u2")
    new.setitem(READERS, NEW.family, _read_all)
    new.setitem(DECODERS, NEW.family, lambda _data, _frame: image)
    acceptance.precheck(make_dicom(transfer_syntax=NEW.uid, encoded=b"frame"), ("DX",))
    assert decoders.unfit_decoders() == (NEW.uid,)
    with pytest.raises(DecoderUnfit, match=NEW.uid):
        decode(b"frame", NEW.uid, _layout(NEW))
    new.setitem(known_answers.ENCODED, "NEW", base64.b64encode(b"frame").decode())
    assert decoders.unfit_decoders() == ()


def test_a_family_without_a_decoder_is_unfit(new: pytest.MonkeyPatch) -> None:
    new.setitem(READERS, NEW.family, _read_all)
    new.setitem(known_answers.ENCODED, "NEW", base64.b64encode(b"frame").decode())
    assert decoders.unfit_decoders() == (NEW.uid,)


@pytest.mark.parametrize("uid", [JPEG2000Lossless, RLELossless])
def test_a_tolerance_or_a_depth_that_is_wrong_makes_a_decoder_unfit(
    uid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = TRANSFER_SYNTAXES[uid]
    for changed in ({"tolerance": -1}, {"depth": 8}, {"known_answer": "JPEG_LS_LOSSLESS"}):
        check_decoder.cache_clear()
        monkeypatch.setitem(TRANSFER_SYNTAXES, uid, dataclasses.replace(row, **changed))
        assert decoders.unfit_decoders() == (uid,), changed
    check_decoder.cache_clear()
    monkeypatch.setitem(TRANSFER_SYNTAXES, uid, row)
    assert decoders.unfit_decoders() == ()
