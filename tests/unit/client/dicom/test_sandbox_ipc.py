"""Whatever bytes a worker says, they are an answer or an ``InvalidMessage``."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.client.dicom import facts
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox import ipc
from cloister_fl.client.dicom.size_limits import MAX_KEY_BYTES, MAX_OUT_BYTES, MAX_PIXELS
from cloister_fl.errors import DecoderUnfit, Reject
from cloister_fl.study.schema import VOLUME_KEYS, Input

UNFIT = frozenset(("1.2.840.10008.1.2.4.80",))
FACTS = facts.Facts(48, 40, "0f" * 32, "DX", "Maker", "2019", "1.2.3", "ACC", "Ž-1", "", "e5" * 32)
REQUEST = ipc.Request(7, 10, ("CR", "DX"), 128, "auto", (1.0, 99.0), None)
SAYABLE = {
    reason
    for reason in set(Reject) - {Reject.DUPLICATE, Reject.UNREADABLE, Reject.OUTSIDE_ROOT}
    if not reason.name.startswith("VOLUME_")
}
PLACE = {
    "series": "1.2.840.1",
    "frame": "1.2.840.2",
    "position": "-12.5\\0.0\\1e-05",
    "orientation": "1.0\\0.0\\0.0\\0.0\\0.8\\-0.6",
    "pixel_spacing": "0.5\\0.5",
}


def test_a_request_comes_back_as_it_was() -> None:
    fixed = ipc.Request(2**40, 5, ("CT",), 64, "fixed", (0.1, 99.9), (40.1, 400.3))
    for request in (REQUEST, fixed, dataclasses.replace(fixed, segment="Lungs, left")):
        assert ipc.parse_request(ipc.pack_request(request)) == request


def test_a_request_has_all_that_shapes_a_tensor() -> None:
    # A field that is new in a study's input must not get lost on the way to the worker.
    # How images become a volume is decided where all of them are.
    asked = set(ipc.Request.__dataclass_fields__) - {"serial", "length", "released", "segment"}
    assert set(Input.model_fields) - set(VOLUME_KEYS) == asked


def test_an_image_comes_back_as_it_was() -> None:
    assert ipc.parse_answer(ipc.pack_facts(7, FACTS), REQUEST, UNFIT) == (FACTS, 0)
    placed = dataclasses.replace(FACTS, **PLACE, sex="F", age="45")
    assert ipc.parse_answer(ipc.pack_facts(7, placed), REQUEST, UNFIT) == (placed, 0)
    assert dataclasses.asdict(placed.place) == PLACE


@pytest.mark.parametrize("told", [{"sex": "Doe"}, {"sex": "FM"}, {"age": "45Y"}, {"age": "1945"}])
def test_sex_and_age_have_no_room_for_anything_else(told: dict[str, str]) -> None:
    message = ipc.pack_facts(7, dataclasses.replace(FACTS, **told))
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(message, REQUEST, UNFIT)


OUTLINED = dataclasses.replace(REQUEST, segment="lungs")
MASKS = dataclasses.replace(FACTS, modality="SEG")


def test_outlines_come_back_as_they_were_where_they_were_asked_for() -> None:
    for length in (2, MAX_OUT_BYTES):
        said = ipc.pack_masks(7, MASKS, length)
        assert ipc.parse_answer(said, OUTLINED, UNFIT) == (MASKS, length)
        with pytest.raises(ipc.InvalidMessage):
            ipc.parse_answer(said, REQUEST, UNFIT)
    assert ipc.parse_answer(ipc.pack_facts(7, FACTS), OUTLINED, UNFIT) == (FACTS, 0)


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 0),
        ({}, 1 << 31),
        ({}, MAX_OUT_BYTES + 2),
        ({}, 3),
        ({"modality": "DX"}, 2),
        ({"rows": 0}, 2),
        ({"rows": 1 << 20, "columns": 1 << 20}, 2),
        ({"patient_id": ""}, 2),
        ({"sop_instance": "1.2.CANARY"}, 2),
        ({"sop_instance": "../../x"}, 2),
    ],
)
def test_outlines_that_no_sound_worker_tells_of(change: dict[str, object], length: int) -> None:
    said = ipc.pack_masks(7, dataclasses.replace(MASKS, **change), length)  # type: ignore[arg-type]
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(said, OUTLINED, UNFIT)
    for end in (9, 12):
        with pytest.raises(ipc.InvalidMessage):
            ipc.parse_answer(said[:end], OUTLINED, UNFIT)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("series", "1.2.CANARY"),
        ("series", "1" * 65),
        ("frame", "Ä"),
        ("position", "1.0\\2.0"),
        ("position", "1.0\\2.0\\nan"),
        ("position", "1.0\\2.0\\inf"),
        ("position", "1.0\\2.0\\1e9"),
        ("position", "1.0\\2.0\\999999.0"),
        ("position", "1.0\\2.0\\ 3.0"),
        ("orientation", "1.0\\0.0\\0.0"),
        ("orientation", "1.0\\0.0\\0.0\\0.0\\1.0\\CANARY"),
        ("pixel_spacing", "0.5"),
        ("pixel_spacing", "0.5\\0.5\\0.5"),
    ],
)
def test_a_place_of_another_form_is_no_answer(name: str, text: str) -> None:
    wrong = dataclasses.replace(FACTS, **{**PLACE, name: text})
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(ipc.pack_facts(7, wrong), REQUEST, UNFIT)


def test_facts_are_not_shown() -> None:
    shown = repr(FACTS)
    assert not any(text in shown for text in ("1.2.3", "ACC", "Ž-1", "0f0f", "e5e5"))


@pytest.mark.parametrize("reason", sorted(SAYABLE, key=lambda one: one.value))
def test_a_reason_comes_back_as_it_was(reason: Reject) -> None:
    with pytest.raises(RejectedFile) as caught:
        ipc.parse_answer(ipc.pack_reject(7, reason), REQUEST, UNFIT)
    assert caught.value.reason is reason


def test_unfit_decoders_are_told_at_the_start_and_at_need() -> None:
    assert ipc.parse_hello(ipc.pack_hello(UNFIT)) == UNFIT
    assert ipc.parse_hello(ipc.pack_hello(())) == frozenset()
    (syntax,) = UNFIT
    with pytest.raises(DecoderUnfit):
        ipc.parse_answer(ipc.pack_unfit(7, syntax), REQUEST, UNFIT)
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(ipc.pack_unfit(7, syntax), REQUEST, ())


@pytest.mark.parametrize("hello", [b"", b"cloister", ipc.HELLO + b"x", ipc.HELLO + b"\0CANARY"])
def test_another_hello(hello: bytes) -> None:
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_hello(hello)


@pytest.mark.parametrize(
    "altered",
    [
        {"rows": 0},
        {"columns": 0},
        {"rows": MAX_PIXELS, "columns": 2},
        {"modality": "CT"},
        {"modality": ""},
        {"year": "19"},
        {"year": "CANARY"},
        {"person": "ab"},
        {"sop_instance": ""},
        {"sop_instance": "1.2\n3"},
        {"sop_instance": "1" * 65},
        {"patient_id": ""},
        {"study_instance": "1.2.CANARY"},
    ],
)
def test_facts_that_cannot_be(altered: dict[str, str | int]) -> None:
    wrong = facts.Facts(**{**dataclasses.asdict(FACTS), **altered})
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(ipc.pack_facts(7, wrong), REQUEST, UNFIT)


@pytest.mark.parametrize("text", ["x" * (MAX_KEY_BYTES + 1), "\ud800", "ž" * MAX_KEY_BYTES])
def test_an_identifier_that_is_none_turns_the_file_away(text: str) -> None:
    wrong = facts.Facts(**{**dataclasses.asdict(FACTS), "patient_id": text})
    with pytest.raises(RejectedFile) as caught:
        ipc.pack_facts(7, wrong)
    assert caught.value.reason is Reject.TRUNCATED


def test_an_identifier_too_long_is_not_believed_either() -> None:
    head = struct.pack(
        ">QBII32s13H", 7, 0, 4, 4, bytes(32), 2, 0, 0, 3, MAX_KEY_BYTES + 1, 1, 0, 0, *[0] * 5
    )
    message = head + b"DX1.2" + b"a" * (MAX_KEY_BYTES + 1) + b"P"
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(message, REQUEST, UNFIT)


def _judge(message: bytes) -> None:
    try:
        facts, length = ipc.parse_answer(message, REQUEST, UNFIT)
    except (RejectedFile, DecoderUnfit, ipc.InvalidMessage):
        return
    assert length == 0
    assert facts.rows * facts.columns <= MAX_PIXELS
    assert facts.modality in REQUEST.modalities


@pytest.mark.parametrize("reason", sorted(set(Reject) - SAYABLE, key=lambda one: one.value))
def test_a_reason_that_is_not_a_workers_is_not_believed(reason: Reject) -> None:
    with pytest.raises(ipc.InvalidMessage):
        ipc.parse_answer(ipc.pack_reject(7, reason), REQUEST, UNFIT)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", struct.pack(">QB", 7, 0)]))
def test_any_bytes_are_judged(content: bytes, start: bytes) -> None:
    _judge(start + content)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_answer_is_judged(data: st.DataObject) -> None:
    message = bytearray(ipc.pack_facts(7, FACTS))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    _judge(bytes(message[: data.draw(st.integers(0, len(message)))]))
