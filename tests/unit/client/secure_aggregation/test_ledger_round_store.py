"""What a site remembers of secure aggregation: durable, first write wins, in the ledger's chain."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.secure_aggregation.exchange import RoundMemory
from cloister_fl.errors import LedgerDamaged, ParameterRefused
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.secagg.session import Session
from support.errors import raises

STUDY = bytes(range(32))
DELTA = 1e-5


def _memory(
    folder: Path, subject: bytes = STUDY, *, is_noised: bool = True, most_epochs: int = 99
) -> RoundMemory:
    ledger = Ledger.open(folder / "ledger.sqlite", delta=DELTA)
    return RoundMemory(
        lambda: ledger, subject=subject, is_noised=is_noised, most_epochs=most_epochs
    )


def _sum(number: int, model: bytes | None = None, *, attempt: int = 0) -> Session:
    """The session of a sum; each number has a model of its own, unless one is given."""
    given = bytes([number]) * 32 if model is None else model
    return Session(number, attempt, given, 3, 1.0, (("a", 1.0), ("b", 1.0), ("c", 1.0)))


def test_an_epoch_is_claimed_once_and_a_restart_does_not_forget(tmp_path: Path) -> None:
    assert _memory(tmp_path).claim_epoch(b"k" * 32) is True
    assert _memory(tmp_path).claim_epoch(b"k" * 32) is False
    assert _memory(tmp_path).claim_epoch(b"l" * 32) is True


def test_the_first_constants_stand(tmp_path: Path) -> None:
    assert _memory(tmp_path).open_round(_sum(2), b"1" * 32) == b"1" * 32
    assert _memory(tmp_path).open_round(_sum(2), b"2" * 32) == b"1" * 32
    assert _memory(tmp_path).open_round(_sum(3), b"2" * 32) == b"2" * 32


def test_what_makes_the_same_update_shares_a_memory(tmp_path: Path) -> None:
    """Without privacy, two studies that differ in name alone give the same updates."""
    one, two = _memory(tmp_path, b"s" * 32), _memory(tmp_path, b"s" * 32)
    three = _memory(tmp_path, b"t" * 32)
    assert one.commit(_sum(2), ("a", "b")) == ("a", "b")
    assert two.commit(_sum(2), ("a", "c")) == ("a", "b")
    assert three.commit(_sum(2), ("a", "c")) == ("a", "c")


def test_two_open_studies_over_one_model_and_its_first_answer_stands(tmp_path: Path) -> None:
    """Without privacy, a study of 3 rounds and one of 4 give the same first update."""
    short = _memory(tmp_path, b"s" * 32, is_noised=False)
    long = _memory(tmp_path, b"t" * 32, is_noised=False)
    model = b"m" * 32
    assert short.open_round(_sum(2, model), b"1" * 32) == b"1" * 32
    assert long.open_round(_sum(4, model), b"2" * 32) == b"1" * 32
    assert short.commit(_sum(2, model), ("a", "b")) == ("a", "b")
    assert long.committed(_sum(4, model)) == ("a", "b")
    assert long.commit(_sum(4, model), ("a", "c")) == ("a", "b")
    # The counts over the same model are another sum; another model is another update.
    assert long.commit(_sum(5, model), ("a", "c")) == ("a", "c")
    assert long.commit(_sum(6, b"n" * 32), ("a", "c")) == ("a", "c")
    # And no second answer in one round of one study, whatever the model is then.
    assert short.committed(_sum(2, b"o" * 32, attempt=1)) == ("a", "b")
    assert short.commit(_sum(2, b"o" * 32, attempt=1), ("b", "c")) == ("a", "b")


def test_with_noise_each_study_answers_for_itself(tmp_path: Path) -> None:
    one, two = _memory(tmp_path, b"s" * 32), _memory(tmp_path, b"t" * 32)
    model = b"m" * 32
    assert one.commit(_sum(2, model), ("a", "b")) == ("a", "b")
    assert two.commit(_sum(2, model), ("a", "c")) == ("a", "c")


def test_a_server_cannot_fill_the_ledger_with_epochs(tmp_path: Path) -> None:
    memory = _memory(tmp_path, most_epochs=3)
    assert all(memory.claim_epoch(bytes([number]) * 32) for number in range(3))
    with raises(ParameterRefused, match="3 key epochs"):
        memory.claim_epoch(b"x" * 32)
    assert memory.claim_epoch(bytes(32)) is False


def test_the_first_answer_stands(tmp_path: Path) -> None:
    assert _memory(tmp_path).committed(_sum(2)) is None
    assert _memory(tmp_path).commit(_sum(2), ("a", "b")) == ("a", "b")
    assert _memory(tmp_path).commit(_sum(2), ("a", "c")) == ("a", "b")
    assert _memory(tmp_path).committed(_sum(2)) == ("a", "b")
    assert _memory(tmp_path).committed(_sum(4)) is None


def test_it_spends_nothing_and_the_ledger_reads_past_it(tmp_path: Path) -> None:
    memory = _memory(tmp_path)
    ledger = Ledger.open(tmp_path / "ledger.sqlite", delta=DELTA)
    ledger.reserve("ab" * 32, "run", Mechanism(2.0, 0.5), 4, DELTA, 100.0, 100.0)
    memory.claim_epoch(b"k" * 32)
    memory.open_round(_sum(2), b"1" * 32)
    ledger.start_round("ab" * 32, "run", 1, 2)
    memory.commit(_sum(2), ("a", "b"))
    assert [entry.kind for entry in ledger.entries()] == [
        "created",
        "reserved",
        "epoch",
        "round",
        "started",
        "answered",
    ]
    assert [held.left for held in ledger.reservations()] == [2]


def test_an_answer_that_was_changed_by_hand_is_found(tmp_path: Path) -> None:
    _memory(tmp_path).commit(_sum(2), ("a", "b"))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("""UPDATE entries SET body = replace(body, '"b"', '"c"')""")
    with raises(LedgerDamaged):
        _memory(tmp_path).committed(_sum(2))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["claim", "open", "commit"]),
            st.integers(0, 2),
            st.sampled_from([("a", "b", "c"), ("a", "b"), ("a", "c")]),
        ),
        max_size=8,
    )
)
def test_first_write_wins_in_any_order(
    steps: list[tuple[str, int, tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("memory")
    epochs: set[int] = set()
    opened: dict[int, bytes] = {}
    commits: dict[int, tuple[str, ...]] = {}
    for kind, number, names in steps:
        memory = _memory(folder)
        if kind == "claim":
            assert memory.claim_epoch(bytes([number]) * 32) is (number not in epochs)
            epochs.add(number)
        elif kind == "open":
            constants = "".join(names).encode().ljust(32)
            expected = opened.setdefault(number, constants)
            assert memory.open_round(_sum(number), constants) == expected
        else:
            assert memory.commit(_sum(number), names) == commits.setdefault(number, names)
        assert memory.committed(_sum(number)) == commits.get(number)
