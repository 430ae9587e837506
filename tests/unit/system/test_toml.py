"""Hand-written TOML: every fault at once, at the right line, with the nearest key."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from cloister_fl.errors import Fault, FileUnreadable
from cloister_fl.system.toml import MAX_BYTES, FileModel, parse, read_text
from cloister_fl.system.toml_positions import key_lines


class Inner(FileModel):
    rounds: int = Field(default=1, ge=1, le=100)
    rate: float = 1.0
    words: tuple[str, ...] = Field(default=(), strict=False)


class Model(FileModel):
    name: str
    inner: Inner = Inner()
    mixed: dict[str, int | float | str] = {}


def faults(text: str) -> list[tuple[int, str]]:
    model, found = parse(text, Model)
    assert (model is None) == bool(found)
    return [(fault.line, fault.key) for fault in found]


def only(text: str) -> Fault:
    _, found = parse(text, Model)
    assert len(found) == 1, found
    return found[0]


# Faults and their lines


def test_a_valid_file_has_no_faults() -> None:
    model, found = parse('name = "a"\n[inner]\nrounds = 3\n', Model)
    assert found == ()
    assert model == Model(name="a", inner=Inner(rounds=3))


def test_all_faults_at_once_in_the_order_of_the_lines() -> None:
    text = '[inner]\nrounds = 0\nrte = 1\nrate = "x"\n[mixed]\na = []\n'
    assert faults(text) == [
        (0, "name"),
        (2, "inner.rounds"),
        (3, "inner.rte"),
        (4, "inner.rate"),
        (6, "mixed.a"),
    ]


def test_an_unknown_key_names_the_nearest_or_all() -> None:
    assert only('name = "a"\n[inner]\nround = 1\n').hint == "Did you mean 'rounds'?"
    assert only('name = "a"\n[iner]\n').hint == "Did you mean 'inner'?"
    assert only('name = "a"\n[inner]\nzzz = 1\n').hint == "Known keys here: rounds, rate, words."


def test_a_wrong_value_is_quoted_if_it_is_short() -> None:
    assert only('name = "a"\n[inner]\nrounds = 101\n').hint == "It says 101."
    assert only(f'name = "a"\n[inner]\nrounds = "{"x" * 99}"\n').hint == ""


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ('name = "a"\ninner.rte = 1\n', 2, "inner.rte"),
        ('name = "a"\n\ninner = { rounds = 0 }\n', 3, "inner.rounds"),
        ('name = "a"\n"inner" . "rte" = 1\n', 2, "inner.rte"),
        ("name = \"a\"\n['inner']\n'rte' = 1\n", 3, "inner.rte"),
        ('name = "a"\n[ inner ]  # words\n  rte=1\n', 3, "inner.rte"),
        ('name = "a"\n[inner]\n"r\\u0074e" = 1\n', 3, "inner.rte"),
        ('name = """\n[inner]\nrte = 1\n"""\n[inner]\nrte = 1\n', 6, "inner.rte"),
        ("name = '''\n[inner]\nrte = 1\n'''\n[inner]\nrte = 1\n", 6, "inner.rte"),
        ('name = """a \\""" b\n[x]\n"""\n[inner]\nrte = 1\n', 5, "inner.rte"),
        ('name = """\\\n  a""""\n[inner]\nrte = 1\n', 4, "inner.rte"),
        ('name = """a"""""\n[inner]\nrte = 1\n', 3, "inner.rte"),
        ("name = ''''a'''''\n[inner]\nrte = 1\n", 3, "inner.rte"),
        ('name = "a # [ b"\n[inner]\nrte = 1\n', 3, "inner.rte"),
        ('name = "a\u2028b\u0085c"\n[inner]\nrte = 1\n', 3, "inner.rte"),
        ('name = "a"\n[inner]\nwords = [\n  "]",  # ]\n  "x",\n]\nrte = 1\n', 7, "inner.rte"),
        ('name = "a"\n[inner]\nwords = ["""a"""",\n"rte = 1"]\nrte = 1\n', 5, "inner.rte"),
        ('name = "a"\n[inner]\nwords = ["""a""""]\nrte = 1\n', 4, "inner.rte"),
        ("name = 'a'\n[inner]\nwords = ['''a'''']\nrte = 1\n", 4, "inner.rte"),
        ('name = "a"\r\n[inner]\r\nrte = 1\r\n', 3, "inner.rte"),
        ('name = "a"\n[mixed]\n1 = 1\n2 = []\n', 4, "mixed.2"),
    ],
)
def test_lines_are_found_in_every_spelling(text: str, line: int, key: str) -> None:
    tomllib.loads(text)
    assert faults(text) == [(line, key)]


def test_an_item_of_a_list_is_one_fault_and_not_a_short_list_too() -> None:
    class Pairs(FileModel):
        pair: tuple[str, ...] = Field(min_length=2, strict=False)

    _, found = parse('pair = [1, "b"]', Pairs)
    assert [(fault.line, fault.key) for fault in found] == [(1, "pair.0")]
    _, found = parse('pair = ["b"]', Pairs)
    assert [(fault.line, fault.key) for fault in found] == [(1, "pair")]


def test_a_value_of_no_accepted_type_is_one_fault() -> None:
    fault = only('name = "a"\n[mixed]\nx = [1]\n')
    assert str(fault) == "line 3: mixed.x: has a value of a type that is not accepted."


def test_a_value_where_a_table_should_be() -> None:
    assert faults('name = "a"\ninner = 3\n') == [(2, "inner")]


# Files that are not TOML


def test_a_syntax_error_is_told_with_its_line() -> None:
    fault = only('name = "a"\n[inner]\nrounds = = 3\n')
    assert (fault.line, fault.key, fault.message) == (3, "TOML", "Invalid value.")


@pytest.mark.parametrize("text", ['name = "a', 'name = """a\n\nb\n', "name = [\n1,\n", "name"])
def test_an_unfinished_file_is_a_syntax_error_at_its_end(text: str) -> None:
    fault = only(text)
    assert fault.key == "TOML"
    assert fault.line == text.rstrip().count("\n") + 1


def test_a_key_twice_is_a_syntax_error() -> None:
    assert only('name = "a"\nname = "b"\n').key == "TOML"


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000 + "]" * 5000])
def test_what_tomllib_cannot_bear_is_a_fault_and_no_crash(value: str) -> None:
    assert only(f"name = {value}\n").key == "TOML"


def test_an_integer_too_long_to_print_is_a_fault_and_no_crash() -> None:
    assert faults(f'name = "a"\n[inner]\nrounds = 0x{"f" * 5000}\n') == [(3, "inner.rounds")]


# Reading


def test_read_text_drops_a_byte_order_mark_and_keeps_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b'\xef\xbb\xbfname = "a"\r\n[inner]\r\nrte = 1\r\n')
    assert faults(read_text(file)) == [(3, "inner.rte")]


def test_read_text_refuses_what_is_no_text_file(tmp_path: Path) -> None:
    cases: dict[str, Path] = {name: tmp_path / name for name in ("none", "dir", "pipe", "big")}
    cases["dir"].mkdir()
    os.mkfifo(cases["pipe"])
    cases["big"].write_bytes(b"#" * (MAX_BYTES + 1))
    cases["latin"] = tmp_path / "latin"
    cases["latin"].write_bytes('name = "Müller"'.encode("latin-1"))
    for name, path in cases.items():
        with pytest.raises(FileUnreadable) as caught:
            read_text(path)
        assert name in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    assert "UTF-8" in str(caught.value)


def test_the_largest_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"#" * MAX_BYTES)
    assert len(read_text(file)) == MAX_BYTES


# Properties


_ALPHABET = st.sampled_from(list("ab.=[]{}\"'#\\ \n\r\t1,-\u2028é"))


@given(st.one_of(st.text(), st.text(_ALPHABET, max_size=60)))
@settings(max_examples=250, deadline=None)
def test_key_lines_bears_any_text(text: str) -> None:
    last = text.count("\n") + 1
    assert all(1 <= line <= last for line in key_lines(text).values())
    model, found = parse(text, Model)
    assert (model is None) == bool(found)


_WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)
_KEYS = st.one_of(st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True), _WORD)
_VALUES = st.one_of(
    st.integers(-9, 9),
    st.booleans(),
    st.text(st.sampled_from(list("ab[]{}\"'#\\=\n")), max_size=12),
    st.lists(st.text(st.sampled_from(list("a[]{}\"'#=\n")), max_size=6), max_size=4),
)
_DOCUMENTS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    _KEYS,
    st.recursive(_VALUES, lambda inner: st.dictionaries(_KEYS, inner, max_size=4)),
    max_size=5,
)


def _paths(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _paths(value, (*prefix, key))
        else:
            found.append((*prefix, key))
    return found


@pytest.mark.long
@given(_DOCUMENTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_key_lines_finds_each_key_of_a_written_document(
    document: dict[str, Any], multiline: bool
) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    found = key_lines(text)
    lines = text.split("\n")
    for path in _paths(document):
        assert path in found, path
        # The line must be a statement that gives the key, spelled bare or quoted.
        written = (
            tomllib.loads(lines[found[path] - 1].split("=")[0] + "= 0")
            if "=" not in path[-1]
            else None
        )
        assert written is None or list(written) == [path[-1]]
    # And every line that a key is said to stand on comes from a different key.
    leaves = [found[path] for path in _paths(document)]
    assert len(set(leaves)) == len(leaves)
