"""The typed messages: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloister_fl.errors import MessageInvalid
from cloister_fl.protocol.round_messages import (
    Evaluated,
    EvaluateTask,
    Exchange,
    Exchanged,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    RoundMessage,
    TrainTask,
    Update,
    head_of,
    kind_of,
    message_kinds,
    octets,
    pack,
    payload_bytes,
    payload_hash,
    unpack,
)

VECTOR = np.array([1.5, -2.25, 0.0], np.float32)


def _update() -> RecordDict:
    return pack(Update(site="north", round=3, vector=VECTOR))


@given(hnp.arrays(np.float32, st.integers(0, 50)), st.text(max_size=20), st.integers(1, 2**40))
def test_an_update_survives_the_journey_to_the_bit(
    vector: np.ndarray, site: str, number: int
) -> None:
    received = unpack(pack(Update(site=site, round=number, vector=vector)), Update)
    assert (received.site, received.round) == (site, number)
    assert received.vector.dtype == np.float32
    assert received.vector.tobytes() == vector.tobytes()


@pytest.mark.parametrize("kind", [TrainTask, EvaluateTask])
def test_a_task_says_what_every_task_says_and_its_model(
    kind: type[TrainTask | EvaluateTask],
) -> None:
    records = pack(
        kind(study="s", run="r", round=2, sites=5, exchange=octets(b"\1\2"), vector=VECTOR)
    )
    assert list(records["cloister"]) == [
        *("version", "kind", "log_head"), *("study", "run", "round", "sites"),
    ]  # fmt: skip
    assert list(records["arrays"]) == ["exchange", "vector"]
    received = unpack(records, Exchange, TrainTask, EvaluateTask)
    assert type(received) is kind
    assert (received.study, received.run, received.round, received.sites) == ("s", "r", 2, 5)
    assert received.exchange.tobytes() == b"\1\2"
    assert received.vector.tobytes() == VECTOR.tobytes()
    # What every task has in common is no message that anybody takes.
    records["cloister"]["kind"] = "task"
    with pytest.raises(MessageInvalid):
        unpack(records, Exchange, TrainTask, EvaluateTask)


def test_a_bundle_goes_as_the_bytes_that_it_is_and_any_other_array_as_a_copy() -> None:
    data = bytes(range(100))
    whole = octets(data)
    for view, goes_as_it_is in (
        (whole, True),
        (whole[:], False),
        (whole[1:], False),
        (whole[::-1], False),
        (np.frombuffer(data, "<i8", count=12), False),
        (np.frombuffer(data, np.uint8, count=99, offset=1), False),
    ):
        sent = pack(Exchanged(site="a", round=1, exchange=view))["arrays"]["exchange"].data
        assert sent == view.astype(np.uint8).tobytes()
        assert (sent is data) is goes_as_it_is


def test_counts_keep_64_bits() -> None:
    counts = np.array([2**40, 0, 7], np.int64)
    received = unpack(pack(Evaluated(site="a", round=1, bins=3, counts=counts)), Evaluated)
    np.testing.assert_array_equal(received.counts, counts)


def test_a_message_says_what_its_fields_say_and_no_more() -> None:
    records = _update()
    assert set(records) == {"cloister", "arrays"}
    assert dict(records["cloister"]) == {
        "version": "cloister/round/v6",
        "kind": "update",
        "log_head": "",
        "site": "north",
        "round": 3,
    }
    assert list(records["arrays"]) == ["vector"]
    assert records["arrays"]["vector"].data == VECTOR.tobytes()


def test_payload_counts_arrays_names_and_values() -> None:
    records = pack(Prepared(site="north", signature=b"", ledger=""))
    said = "version cloister/round/v6 kind prepared site north signature b'' ledger".replace(
        " ", ""
    )
    assert payload_bytes(records) == len(said)
    assert (
        payload_bytes(_update())
        - payload_bytes(pack(Update(site="north", round=3, vector=VECTOR[:0])))
        == 12
    )


def test_another_kind_is_refused() -> None:
    with pytest.raises(MessageInvalid, match="not of the expected kind"):
        unpack(pack(Prepared(site="north", signature=b"", ledger="")), Update)


@pytest.mark.parametrize("key", ["version", "kind", "log_head", "site", "round"])
def test_a_missing_field_is_refused(key: str) -> None:
    records = _update()
    del records["cloister"][key]
    with pytest.raises(MessageInvalid):
        unpack(records, Update)


def test_an_additional_field_is_refused() -> None:
    records = _update()
    records["cloister"]["patients"] = 120
    with pytest.raises(MessageInvalid, match="other fields"):
        unpack(records, Update)


def test_an_additional_record_is_refused() -> None:
    records = _update()
    records["metrics"] = ConfigRecord({"loss": 0.3})
    with pytest.raises(MessageInvalid, match="other fields"):
        unpack(records, Update)


@pytest.mark.parametrize("value", [True, 3.0, "3", b"3", [3]])
def test_a_field_of_another_type_is_refused(value: object) -> None:
    records = _update()
    records["cloister"]["round"] = value
    with pytest.raises(MessageInvalid, match="another type"):
        unpack(records, Update)


@pytest.mark.parametrize(
    "array",
    [
        Array("float64", (3,), "cloister.raw", bytes(24)),
        Array("float32", (3,), "numpy.ndarray", bytes(12)),
        Array("float32", (3,), "cloister.raw", bytes(11)),
        Array("float32", (2**40,), "cloister.raw", bytes(12)),
        Array("float32", (3, 1), "cloister.raw", bytes(12)),
    ],
    ids=["dtype", "serialiser", "short", "lying", "matrix"],
)
def test_an_array_of_another_form_is_refused(array: Array) -> None:
    records = _update()
    records["arrays"] = ArrayRecord({"vector": array})
    with pytest.raises(MessageInvalid, match="agreed form"):
        unpack(records, Update)


def test_an_array_under_another_name_is_refused() -> None:
    records = _update()
    array = records["arrays"]["vector"]
    records["arrays"] = ArrayRecord({"vector": array, "gradient": array})
    with pytest.raises(MessageInvalid, match="other arrays"):
        unpack(records, Update)


def test_another_version_is_refused() -> None:
    records = _update()
    records["cloister"]["version"] = "cloister/round/v2"
    with pytest.raises(MessageInvalid, match="version"):
        unpack(records, Update)


def test_empty_records_are_refused() -> None:
    with pytest.raises(MessageInvalid):
        unpack(RecordDict(), Update, Refusal)


@given(st.binary(max_size=40), st.text(max_size=8))
def test_garbage_ends_in_the_named_error(data: bytes, name: str) -> None:
    records = RecordDict({"cloister": ConfigRecord({"version": data, name or "kind": data})})
    with pytest.raises(MessageInvalid):
        unpack(records, TrainTask, Prepare, Refusal)


def test_no_field_of_a_message_may_be_left_out() -> None:
    found = []
    for kind in RoundMessage.__subclasses__():
        for field in dataclasses.fields(kind):
            given = (field.default, field.default_factory)
            if given != (dataclasses.MISSING, dataclasses.MISSING):
                found.append(f"{kind.kind}.{field.name}")
    assert found == []


def test_the_list_of_refusals_is_closed() -> None:
    assert {reason.value for reason in Refused} == {
        "bundle",
        "policy",
        "approval",
        "hours",
        "budget",
        "round-spent",
        "message",
        "roster",
        "protocol",
        "model",
        "declined",
    }


def test_a_message_carries_its_sender_s_audit_head() -> None:
    records = pack(Prepared(site="north", signature=b"", ledger=""), log_head="ab:cd:ef")
    assert head_of(records) == "ab:cd:ef"
    assert unpack(records, Prepared) == Prepared(site="north", signature=b"", ledger="")
    assert head_of(RecordDict()) == ""


def test_the_payload_s_hash_is_over_all_that_it_says_but_the_head() -> None:
    base = payload_hash(_update())
    assert base == payload_hash(
        pack(Update(site="north", round=3, vector=VECTOR), log_head="ab:cd:ef")
    )
    others = [
        Update(site="south", round=3, vector=VECTOR),
        Update(site="north", round=4, vector=VECTOR),
        Update(site="north", round=3, vector=VECTOR + 1),
    ]
    assert len({base, *(payload_hash(pack(other)) for other in others)}) == 4


def test_the_kind_is_told_only_where_it_exists() -> None:
    records = _update()
    assert kind_of(records) == "update"
    assert set(message_kinds()) == {
        *("prepare", "prepared", "train", "exchange", "exchanged", "update", "evaluate"),
        *("evaluated", "refusal", "finish", "finished"),
    }
    for kind in message_kinds():
        records["cloister"]["kind"] = kind
        assert kind_of(records) == kind
    records["cloister"]["kind"] = "patient-doe"
    assert kind_of(records) == ""
