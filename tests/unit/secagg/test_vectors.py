"""The published rounds: made again from their seeds, read by two implementations, and spoilt."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister_fl.errors import TranscriptMismatch
from cloister_fl.membership.roster import Roster, compare
from cloister_fl.secagg.crypto import hashes
from cloister_fl.secagg.messages.codec import _KINDS
from cloister_fl.secagg.transcript import replay
from support.secagg_vectors import CASES, DIMENSION, play
from vectors.reader import Refused, read, read_with_secrets

TESTS = Path(__file__).parents[2]
FOLDER = TESTS / "vectors" / "secagg"
DOCUMENT = (TESTS.parent / "docs" / "secure-aggregation.md").read_text("utf-8")
ALL_MESSAGES = ("n5-complaint", "n5-silent-dealer")
"""Rounds that have every message of a round between them."""


@cache
def text_of(case: str) -> str:
    return (FOLDER / f"{case}.json").read_text("utf-8")


def test_every_file_is_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)
    assert all(f"`{case}`" in DOCUMENT for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_made_again_from_the_seeds(case: str) -> None:
    assert play(case) == text_of(case)


@pytest.mark.parametrize("case", CASES)
def test_two_readers_come_to_the_sum(case: str) -> None:
    aggregate = replay(text_of(case))
    seen = read_with_secrets(text_of(case))
    assert [site.decode() for site in seen.u3] == list(aggregate.survivors)
    assert np.array_equal(np.array(seen.total(), np.uint32), aggregate.total)
    gone = CASES[case].gone(2)
    if CASES[case].silent:
        gone.add(CASES[case].unsound[1])
    assert set(aggregate.survivors) == set(CASES[case].sites) - gone
    notes = json.loads(text_of(case))["notes"]["sites"]
    total = np.zeros(DIMENSION, np.int64)
    for name in aggregate.survivors:
        value = np.asarray(notes[name]["update"]) * notes[name]["weight"] * aggregate.scale
        total += np.rint(value).astype(np.int64)
    assert np.array_equal(total, aggregate.total.view(np.int32))


def test_the_reader_is_of_another_hand() -> None:
    tree = ast.parse((TESTS / "vectors" / "reader.py").read_text("utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    standard = {
        "__future__", "collections", "fractions", "hashlib", "itertools", "json", "pathlib", "re",
        "struct", "sys", "typing",
    }  # fmt: skip
    assert imported - standard == {"blake3", "cryptography"}


def test_the_document_names_every_message_and_label() -> None:
    for kind in _KINDS.values():
        assert f"| `{kind.__name__}` | `{kind.NAME}` |" in DOCUMENT
    for label in vars(hashes).values():
        if isinstance(label, str) and label.startswith("secagg/v2/sign/"):
            assert label.removeprefix("secagg/v2/sign") in DOCUMENT


# One bit of each field


def fields(data: bytes) -> list[tuple[int, int]] | None:
    """Where the fields of a frame begin and end; None for what is no frame."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "big")
        if at + 8 + size > len(data):
            return None
        found.append((at + 8, at + 8 + size))
        at += 8 + size
    return found


def leaves(data: bytes, start: int = 0, name: str = "") -> Iterator[tuple[str, int]]:
    """Each field that holds no others, with the place of its last byte; items share a name."""
    if len(data) > 8 and (found := fields(data)) is not None:
        for number, (first, end) in enumerate(found):
            yield from leaves(data[first:end], start + first, f"{name}.{number}")
    elif len(data) > 12 and (found := fields(data[4:])) is not None:
        yield f"{name}.count", start + 3
        for first, end in found:
            yield from leaves(data[4 + first : 4 + end], start + 4 + first, f"{name}.*")
    elif data:
        yield name, start + len(data) - 1


def flipped(data: bytes, at: int) -> str:
    return (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]).hex()


def field_classes() -> dict[str, tuple[str, int, int]]:
    """The case, message and byte where each field of each message stands first."""
    found: dict[str, tuple[str, int, int]] = {}
    for case in ALL_MESSAGES:
        for number, entry in enumerate(json.loads(text_of(case))["messages"]):
            for name, at in leaves(bytes.fromhex(entry["bytes"])):
                found.setdefault(entry["message"] + name, (case, number, at))
    return found


FIELDS = field_classes()


def refused_by_both(data: Any) -> None:
    text = json.dumps(data)
    with pytest.raises(Refused):
        read(text)
    with pytest.raises(TranscriptMismatch):
        replay(text)


def test_every_message_of_a_round_is_spoilt() -> None:
    assert {name.split(".")[0] for name in FIELDS} == {
        kind.NAME for kind in _KINDS.values() if kind.NAME not in {"abort", "bundle"}
    }
    assert len(FIELDS) > 90


@pytest.mark.parametrize("name", FIELDS)
def test_one_flipped_bit_is_refused_by_both_readers(name: str) -> None:
    case, number, at = FIELDS[name]
    data = json.loads(text_of(case))
    entry = data["messages"][number]
    entry["bytes"] = flipped(bytes.fromhex(entry["bytes"]), at)
    refused_by_both(data)


def test_a_flipped_bit_of_the_roster_is_refused_by_both_readers() -> None:
    data = json.loads(text_of("n5"))
    roster = bytes.fromhex(data["roster"])
    for _, at in leaves(roster):
        refused_by_both({**data, "roster": flipped(roster, at)})


def _entry(**changes: object) -> Callable[[Any], None]:
    return lambda data: data["messages"][13].update(changes)


SPOILT: dict[str, Callable[[Any], Any]] = {
    "an entry of another direction": _entry(direction="to site"),
    "an entry of no direction": _entry(direction="aside"),
    "an entry of another site": _entry(site="site-03"),
    "an entry of another name": _entry(message="share?"),
    "a message that is missing": lambda data: data["messages"].pop(13),
    "a beginning that is missing": lambda data: data["messages"].pop(0) and data["messages"].pop(0),
    "an end that is missing": lambda data: [data["messages"].pop() for _ in range(4)],
    "another sum": lambda data: data["outcome"].update(total="00" * 64),
    "other survivors": lambda data: data["outcome"].update(survivors=["site-01"]),
    "another scale": lambda data: data["outcome"].update(scale=2.0),
    "another format": lambda data: data.update(format="secagg/v1"),
    "no messages": lambda data: data.update(messages=[]),
    "no outcome": lambda data: data.pop("outcome"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_transcript_is_refused_by_both_readers(what: str) -> None:
    data = json.loads(text_of("n5-dropout"))
    SPOILT[what](data)
    refused_by_both(data)


def test_what_is_no_transcript_is_refused_by_both_readers() -> None:
    for text in ("", "[]", "{}", '{"format": 1}', text_of("n5")[:-9]):
        with pytest.raises(TranscriptMismatch):
            replay(text)
        with pytest.raises(Refused):
            read(text)


def test_a_round_under_the_roster_before_its_renewal_is_refused_by_both_readers() -> None:
    data = json.loads(text_of("n5-renewed"))
    before, after = data["notes"]["previous_roster"], data["roster"]
    change = compare(*(Roster.decode(bytes.fromhex(roster)) for roster in (before, after)))
    assert (change.added, change.removed) == (("site-07",), ("site-06",))
    assert change.rekeyed == CASES["n5-renewed"].rekeyed
    refused_by_both({**data, "roster": before})


@pytest.mark.parametrize("name", ["identity", "seed", "b", "enc_sk", "mask_sk"])
def test_another_secret_in_the_notes_is_refused_by_the_reader(name: str) -> None:
    data = json.loads(text_of("n5"))
    note = data["notes"]["sites"]["site-03"]
    note[name] = flipped(bytes.fromhex(note[name]), 4)
    with pytest.raises(Refused):
        read_with_secrets(json.dumps(data))


def test_another_update_in_the_notes_is_refused_by_the_reader() -> None:
    data = json.loads(text_of("n5"))
    data["notes"]["sites"]["site-03"]["update"][7] += 1e-3
    with pytest.raises(Refused, match="would have sent another mask"):
        read_with_secrets(json.dumps(data))
