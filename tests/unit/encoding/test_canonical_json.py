"""Canonical JSON: bytes that hashes stand on."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_fl.encoding.canonical_json import (
    GENESIS,
    HASH,
    canonical_json,
    entry_hash,
    parse_canonical,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # A lone surrogate stands in JSON as an escape.
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_the_bytes_are_those_that_hashes_stand_on() -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "Köln\n", "Z": True}, "c": 1e-05}
    text = r'{"a":{"Z":true,"\u00fc":"K\u00f6ln\n"},"b":[1,2.5,null],"c":1e-05}'
    assert canonical_json(value) == text
    assert parse_canonical(text) == parse_canonical(text.encode()) == value


# The first text drawn in a new checkout builds the table of characters, which takes a second.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_what_is_written_is_read(value: dict[str, object]) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert parse_canonical(text) == parse_canonical(text.encode()) == value
    assert parse_canonical(json.dumps(value, indent=1)) == (value if text == "{}" else None)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_has_no_form(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": number})


@pytest.mark.parametrize(
    "text",
    [
        '{"b":1,"a":2}',
        '{"a": 1}',
        '{"a":1}\n',
        '{"a":"ü"}',
        '{"a":1.0e0}',
        '{"a":1,"a":1}',
        '{"a":NaN}',
        '{"a":"\ud800"}',
        "[1]",
        "1",
        "",
        "{",
        '{"a":' + "[" * 100_000,
    ],
)
def test_no_other_form_is_read(text: str) -> None:
    assert parse_canonical(text) is None
    assert parse_canonical(text.encode(errors="surrogatepass")) is None


# Hash chains. The hashes below are those of coreutils' sha256sum.
TEXT = '{"kind":"asked","seq":1}'


def test_an_entry_of_the_audit_log_holds_the_hash_before_it() -> None:
    expected = "e07681c56317687a24360813eb3cae4d2eec968f38f23eeb3aef1c6fd5016e51"
    assert entry_hash(b"cloister/audit/v1\0", TEXT) == expected


def test_an_entry_of_the_ledger_has_the_hash_before_it_beside() -> None:
    expected = "419991693b34d0ceefa4807519bf4f303969f87084d6d2d5cc02aca9aa43cc8d"
    assert entry_hash(b"cloister/ledger/v1\0", TEXT, beside=GENESIS) == expected


def test_label_text_and_predecessor_all_count() -> None:
    hashes = {
        entry_hash(label, text, beside=before)
        for label in (b"a\0", b"b\0")
        for text in (TEXT, TEXT + " ")
        for before in (None, GENESIS, "1" * 64)
    }
    assert len(hashes) == 12
    assert all(HASH.fullmatch(one) for one in hashes)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "0" * 63 + "A", "0" * 63 + "\u0663"])
def test_what_is_no_hash(text: str) -> None:
    assert HASH.fullmatch(text) is None
    assert HASH.fullmatch(GENESIS)
