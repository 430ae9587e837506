"""One file out of an archive's answer."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister_fl.client.pacs.multipart import MAX_HEADER_BYTES, InvalidAnswer, single_part

KIND = 'multipart/related; type="application/dicom"; boundary="b0"'


@pytest.mark.parametrize(
    "body",
    [
        b"--b0\r\nContent-Type: application/dicom\r\n\r\nDATA\r\n--b0--\r\n",
        b"--b0\r\nContent-Length: 4\r\n\r\nDATA\r\n--b0--",
        b"\r\n--b0\r\n\r\nDATA\r\n--b0--\r\n",
        b"preamble\r\n--b0 \r\nA: b\r\nC: d\r\n\r\nDATA\r\n--b0--\r\nepilogue",
    ],
)
def test_a_sound_answer(body: bytes) -> None:
    assert single_part(KIND, body) == b"DATA"


def test_data_may_hold_what_looks_like_a_delimiter() -> None:
    data = b"--b0--\r\n\r\n--b0x\r\n"
    body = b"--b0\r\nContent-Length: %d\r\n\r\n" % len(data) + data + b"\r\n--b0--\r\n"
    assert single_part(KIND, body) == data


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/dicom", b"--b0\r\n\r\nDATA\r\n--b0--"),
        ("multipart/related", b"--b0\r\n\r\nDATA\r\n--b0--"),
        (KIND, b""),
        (KIND, b"DATA"),
        (KIND, b"--b0--"),
        (KIND, b"--b0\r\n\r\nDATA"),
        (KIND, b"--b0\r\n\r\nDATA\r\n--b0"),
        (KIND, b"--b0\r\n\r\nDATA\r\n--b0\r\n\r\nMORE\r\n--b0--"),
        (KIND, b"--b0\r\nContent-Length: 999999999999\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0\r\nContent-Length: 3\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0\r\n" + b"a" * 2 * MAX_HEADER_BYTES + b"\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"a" * 2 * MAX_HEADER_BYTES + b"\r\n--b0\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0 sneaky\r\n\r\nDATA\r\n--b0--"),
    ],
)
def test_an_unsound_answer(kind: str, body: bytes) -> None:
    with pytest.raises(InvalidAnswer):
        single_part(kind, body)


@given(st.binary(max_size=300), st.booleans())
@example(b"--b0\r\n\r\n", True)
def test_whatever_is_sent_comes_out(data: bytes, told: bool) -> None:
    length = b"Content-Length: %d\r\n" % len(data) if told else b""
    body = b"--b0\r\n" + length + b"X: y\r\n\r\n" + data + b"\r\n--b0--\r\n"
    if told or b"\r\n--b0" not in b"\r\n" + data:
        assert single_part(KIND, body) == data
        for end in range(len(body) - 4):
            with pytest.raises(InvalidAnswer):
                single_part(KIND, body[:end])


@given(st.lists(st.sampled_from((b"--b0", b"\r\n", b"--", b"Content-Length: 1", b"x", b"\0"))))
def test_any_pieces_are_judged(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    with contextlib.suppress(InvalidAnswer):
        assert single_part(KIND, body) in body
