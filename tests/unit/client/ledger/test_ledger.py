"""The ledger: gates, durability, races, and each kind of tampering named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cloister_fl.audit_log import Head
from cloister_fl.client.ledger import chain, ledger_file
from cloister_fl.client.ledger.ledger import Ledger, Reservation
from cloister_fl.client.ledger.steward_entries import Acceptance, accept_body, close_body
from cloister_fl.errors import (
    BudgetExhausted,
    InternalError,
    LedgerDamaged,
    LedgerRolledBack,
    PolicyRefused,
    RoundAlreadySpent,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy.accounting import calibrate, epsilon_pld
from cloister_fl.privacy.dp_events import Mechanism, compose
from cloister_fl.privacy.renyi_filter import ORDERS
from cloister_fl.system import utc
from support.errors import raises

pytestmark = pytest.mark.process


STUDY, OTHER = "a" * 64, "b" * 64
DELTA = 1e-5
STEPS = 20
STEWARD = Identity.generate()
LOG = Head(7, "1" * 64)
"""Head of an audit log."""
NOISE = Mechanism(calibrate(3.0, DELTA, 1.0, STEPS), 1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger.open(path, delta=1e-6)


def reserve(
    ledger: Ledger,
    study: str = STUDY,
    run: str = "run-1",
    *,
    lifetime: float = 8.0,
    **other: object,
) -> Reservation:
    terms: dict[str, object] = {"mechanism": NOISE, "steps": STEPS, "delta": DELTA}
    terms |= {"epsilon_limit_study": 3.0, "epsilon_limit_lifetime": lifetime, **other}
    return ledger.reserve(study, run, **terms)  # type: ignore[arg-type]


def test_a_new_ledger_fixes_delta_and_orders(ledger: Ledger, path: Path) -> None:
    (first,) = ledger.entries()
    assert first.kind == "created"
    assert first.body["delta"] == 1e-6
    assert first.body["orders"] == list(ORDERS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ledger.head() == (1, first.hash)
    assert Ledger.open(path, delta=1e-6).head() == ledger.head()
    with pytest.raises(PolicyRefused, match="1e-06"):
        Ledger.open(path, delta=1e-5)


def test_a_mode_that_is_too_wide_is_narrowed(ledger: Ledger, path: Path) -> None:
    path.chmod(0o644)
    Ledger.open(path, delta=1e-6)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_reserving_and_starting_add_up(ledger: Ledger) -> None:
    held = reserve(ledger)
    assert (held.steps, held.started, held.left) == (STEPS, 0, STEPS)
    assert ledger.spent() == ()
    assert ledger.spent(reserved=True) == ((NOISE, STEPS),)
    assert ledger.epsilon_lifetime() == 0
    assert ledger.start_round(STUDY, "run-1", 1, 5).left == 15
    assert ledger.start_round(STUDY, "run-1", 2, 5).left == 10
    assert ledger.spent(STUDY) == ((NOISE, 10),)
    assert ledger.spent(OTHER) == ()
    assert ledger.epsilon_study(STUDY, DELTA) == epsilon_pld(NOISE.noise_multiplier, 1.0, 10, DELTA)
    assert ledger.epsilon_study(STUDY, DELTA, reserved=True) <= 3.0
    assert 0 < ledger.epsilon_lifetime() < ledger.epsilon_lifetime(reserved=True)
    assert [entry.kind for entry in ledger.entries()] == [
        "created",
        "reserved",
        "started",
        "started",
    ]


def test_asking_again_changes_nothing(ledger: Ledger) -> None:
    reserve(ledger)
    ledger.start_round(STUDY, "run-1", 1, 5)
    head = ledger.head()
    assert reserve(ledger).started == 5
    assert ledger.head() == head
    with pytest.raises(PolicyRefused, match="other noise, sampling rate, steps or delta"):
        reserve(ledger, steps=STEPS - 1)


def test_a_run_that_never_started_is_replaced(ledger: Ledger) -> None:
    reserve(ledger)
    assert reserve(ledger, run="run-2").left == STEPS
    assert ledger.spent(reserved=True) == ((NOISE, STEPS),)
    with pytest.raises(BudgetExhausted, match="no reservation"):
        ledger.start_round(STUDY, "run-1", 1, 1)
    assert [held.run_id for held in ledger.reservations()] == ["run-2"]
    # Reserved again, the first run would take it back, and so on: still one budget.
    reserve(ledger)
    assert ledger.spent(reserved=True) == ((NOISE, STEPS),)


def test_a_run_that_started_is_not_replaced(ledger: Ledger) -> None:
    reserve(ledger)
    ledger.start_round(STUDY, "run-1", 1, 1)
    with pytest.raises(
        BudgetExhausted, match=r"study budget.*asks for epsilon 3\.000, 0\.000 of 3\.000"
    ):
        reserve(ledger, run="run-2")
    # Training again spends again, where the site allows it.
    reserve(ledger, run="run-2", epsilon_limit_study=6.0)
    assert ledger.spent(STUDY, reserved=True) == ((NOISE, 2 * STEPS),)


def test_closing_releases_what_never_started_and_starts_no_more(ledger: Ledger) -> None:
    reserve(ledger, lifetime=4.5)
    ledger.start_round(STUDY, "run-1", 1, 5)
    with pytest.raises(BudgetExhausted, match="lifetime"):
        reserve(ledger, OTHER, lifetime=4.5)
    assert ledger.close(STUDY, STEWARD) == STEPS - 5
    assert ledger.closed() == {STUDY}
    assert ledger.spent(reserved=True) == ledger.spent() == ((NOISE, 5),)
    head = ledger.head()
    for go_on in (
        lambda: reserve(ledger),
        lambda: reserve(ledger, run="run-2"),
        lambda: ledger.start_round(STUDY, "run-1", 2, 1),
    ):
        with pytest.raises(BudgetExhausted, match="closed"):
            go_on()
    refusal = ledger.refusal(STUDY, NOISE, STEPS, DELTA, 99.0, 99.0)
    assert refusal is not None
    assert "closed" in str(refusal)
    assert ledger.close(STUDY, STEWARD) == 0
    assert ledger.head() == head
    # What was released can be promised to another study, and no more than that.
    few = {"steps": 4}
    assert reserve(ledger, OTHER, lifetime=4.5, **few).left == 4
    with pytest.raises(PolicyRefused, match="nothing"):
        ledger.close("c" * 64, STEWARD)


@pytest.mark.parametrize("forged", ["key", "released", "previous", "study", "twice"])
def test_a_closing_that_no_steward_signed_here_is_named(
    ledger: Ledger, path: Path, forged: str
) -> None:
    reserve(ledger)
    reserve(ledger, OTHER, lifetime=99.0)
    ledger.start_round(STUDY, "run-1", 1, 5)
    previous = ledger.head()[1]
    body = close_body(STUDY, STEPS - 5, previous, STEWARD)
    if forged == "key":
        body["key"] = Identity.generate().public.hex()
    elif forged == "released":
        body = close_body(STUDY, STEPS, previous, STEWARD)
    elif forged == "previous":
        body = close_body(STUDY, STEPS - 5, "0" * 64, STEWARD)
    elif forged == "study":
        body["study"] = OTHER
    else:
        ledger.close(STUDY, STEWARD)
        body = close_body(STUDY, 0, ledger.head()[1], STEWARD)
    forge(path, "closed", **body)
    with raises(LedgerDamaged, match="breaks a rule of the ledger"):
        ledger.verify()


@pytest.mark.parametrize(
    "change",
    [
        {"missed": 4},
        {"missed": -1},
        {"key": "00" * 32},
        {"log_seq": 8},
        {"log_hash": "8" * 64},
        {"claimed": "8" * 64},
    ],
)
def test_an_acceptance_that_no_steward_signed_here_is_named(
    ledger: Ledger, path: Path, change: dict[str, object]
) -> None:
    ledger.accept(3, STEWARD, log=LOG)
    ledger.verify()
    body = accept_body(3, ledger.head()[1], STEWARD, log=LOG)
    forge(path, "accepted", **{**body, **change})
    with raises(LedgerDamaged, match="Entry 3 breaks a rule"):
        ledger.verify()


def test_what_another_key_signed_is_no_word_of_the_steward(path: Path) -> None:
    """A signature proves that whoever has the key in the entry wrote it, and anybody has a key."""
    Ledger.open(path, delta=1e-6)
    ledger = Ledger.open(path, delta=1e-6, signer=STEWARD.public)
    reserve(ledger)
    ledger.accept(2, STEWARD, log=LOG, claimed=frozenset({"8" * 64}))
    stranger = Identity.generate()
    Ledger.open(path, delta=1e-6).close(STUDY, stranger)
    Ledger.open(path, delta=1e-6).accept(9, stranger, log=Head(70, "7" * 64))
    assert ledger.foreign() == (4, 5)
    assert ledger.accepted() == (Acceptance(STEWARD.public, LOG, frozenset({"8" * 64})),)
    head = ledger.head()
    for use in (
        lambda: reserve(ledger, OTHER),
        lambda: ledger.start_round(STUDY, "run-1", 1, 1),
        lambda: ledger.start_release(STUDY, "run-1"),
        lambda: ledger.close(STUDY, STEWARD),
    ):
        with raises(LedgerRolledBack, match="Entry 4 of the privacy ledger is not signed by this"):
            use()
    assert ledger.head() == head
    # So moves a ledger to a folder with another key: its steward accepts all that is in it.
    moved = Ledger.open(path, delta=1e-6, signer=stranger.public)
    assert moved.foreign() == ()
    assert ledger.foreign() == (4, 5)
    ledger.accept(5, STEWARD, log=LOG)
    assert ledger.foreign() == ()
    assert reserve(ledger, OTHER).left == STEPS
    assert moved.foreign() == (6,)


def test_a_start_after_the_closing_is_named(ledger: Ledger, path: Path) -> None:
    reserve(ledger)
    ledger.close(STUDY, STEWARD)
    forge(path, "started", study=STUDY, run="run-1", round=1, steps=1)
    with raises(LedgerDamaged, match="Entry 4 breaks a rule"):
        ledger.verify()


def test_a_quote_is_what_the_gates_then_count(ledger: Ledger) -> None:
    reserve(ledger)
    before = ledger.head()
    quote = ledger.quote(OTHER, NOISE, STEPS, DELTA)
    assert ledger.head() == before
    reserve(ledger, OTHER, lifetime=99.0)
    assert quote.study == ledger.epsilon_study(OTHER, DELTA, reserved=True)
    assert quote.lifetime == ledger.epsilon_lifetime(reserved=True)
    assert 0 < quote.study < quote.lifetime


def test_the_lifetime_gate_counts_what_is_reserved(ledger: Ledger) -> None:
    reserve(ledger)
    before = ledger.head()
    with pytest.raises(BudgetExhausted, match=r"lifetime budget.* of 4.500 is left"):
        reserve(ledger, OTHER, lifetime=4.5)
    assert ledger.head() == before
    reserve(ledger, OTHER)
    reserve(ledger, "c" * 64)
    with pytest.raises(BudgetExhausted, match="lifetime"):
        reserve(ledger, "d" * 64)


def test_a_lowered_limit_also_binds_a_replacement(ledger: Ledger) -> None:
    reserve(ledger)
    with pytest.raises(BudgetExhausted):
        reserve(ledger, run="run-2", lifetime=1.0)
    ledger.start_round(STUDY, "run-1", 1, 1)


def test_a_round_is_spent_once_and_never_beyond(ledger: Ledger) -> None:
    reserve(ledger)
    ledger.start_round(STUDY, "run-1", 1, 15)
    with pytest.raises(RoundAlreadySpent):
        ledger.start_round(STUDY, "run-1", 1, 15)
    with pytest.raises(BudgetExhausted, match="asks for 6 steps; 5 of 20"):
        ledger.start_round(STUDY, "run-1", 2, 6)
    with pytest.raises(BudgetExhausted):
        ledger.start_round(OTHER, "run-1", 2, 1)
    ledger.start_round(STUDY, "run-1", 2, 5)
    assert ledger.spent() == ((NOISE, STEPS),)


@pytest.mark.parametrize(
    "terms",
    [
        {"study": "A" * 64},
        {"run": ""},
        {"run": "a b"},
        {"steps": 0},
        {"delta": 0.0},
        {"lifetime": -1.0},
    ],
)
def test_arguments_that_cannot_be_are_refused(ledger: Ledger, terms: dict[str, object]) -> None:
    with pytest.raises(InternalError):
        reserve(ledger, **terms)  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        ledger.start_round(STUDY, "run-1", 0, 1)
    assert len(ledger.entries()) == 1


def test_a_clock_moved_back_changes_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(ledger)
    monkeypatch.setattr(utc, "now", lambda: datetime(1970, 1, 1, tzinfo=UTC))
    ledger.start_round(STUDY, "run-1", 1, 1)
    with pytest.raises(RoundAlreadySpent):
        ledger.start_round(STUDY, "run-1", 1, 1)


# Tampering. `rewrite` drops the triggers, changes rows, and puts the triggers back.


def rewrite(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        triggers = [row for row in chain.SCHEMA if row[0] == "trigger"]
        for _, name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _, _, statement in triggers:
            connection.execute(statement)
        connection.commit()


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    reserve(ledger)
    for number in (1, 2, 3):
        ledger.start_round(STUDY, "run-1", number, 2)
    return ledger


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE entries SET body = replace(body, ':2', ':1') WHERE seq = 4", "Entry 4 does not"),
        ("UPDATE entries SET hash = lower(hex(randomblob(32))) WHERE seq = 3", "Entry 3 does not"),
        ("UPDATE entries SET body = replace(body, ':', ': ') WHERE seq = 2", "Entry 2 does not"),
        ("UPDATE entries SET body = zeroblob(10) WHERE seq = 2", "Entry 2 does not"),
        ("DELETE FROM entries WHERE seq = 3", "Entry 3 is missing"),
        ("DELETE FROM entries WHERE seq = 1", "Entry 1 is missing"),
        ("DELETE FROM entries", "Entry 1 is missing"),
        ("UPDATE entries SET body = (SELECT e.body FROM entries e WHERE e.seq = 9 - entries.seq) "
            "WHERE seq IN (4, 5)", "Entry 4 does not"),
        ("INSERT INTO entries SELECT 6, body, hash FROM entries WHERE seq = 5", "Entry 6 does not"),
        ("CREATE TABLE other (x)", "tables or triggers"),
    ],
)  # fmt: skip
def test_tampering_is_named(filled: Ledger, path: Path, statement: str, says: str) -> None:
    filled.verify()
    rewrite(path, statement)
    for use in (
        filled.verify,
        filled.entries,
        filled.head,
        filled.spent,
        lambda: Ledger.open(path, delta=1e-6),
        lambda: filled.start_round(STUDY, "run-1", 9, 1),
        lambda: reserve(filled, OTHER),
    ):
        with raises(LedgerDamaged, match=says):
            use()


def test_a_number_that_is_not_finite_is_named_though_its_hash_is_right(
    filled: Ledger, path: Path
) -> None:
    *_, before, last = filled.entries()
    text = json.dumps({**last.body, "steps": math.nan}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(b"cloister/ledger/v2\0" + before.hash.encode() + b"\0" + text.encode())
    rewrite(
        path,
        f"UPDATE entries SET body = '{text}', hash = '{digest.hexdigest()}' WHERE seq = {last.seq}",
    )
    with raises(LedgerDamaged, match=f"Entry {last.seq} is not in canonical form"):
        filled.verify()


TERMS = {"noise_multiplier": 9.0, "sampling_rate": 1.0, "steps": 2, "delta": 0.1}
NONE = {"release_noise_multiplier": None}


def forge(path: Path, kind: str, **body: object) -> None:
    with ledger_file.transaction(path) as connection:
        ledger_file.append(connection, kind, body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("created", {"version": 1, "delta": 1e-6, "orders": [2.0]}),
        ("refunded", {"study": STUDY, "run": "run-1", "steps": 2}),
        ("started", {"study": STUDY, "run": "run-1", "round": 3, "steps": 2}),
        ("started", {"study": STUDY, "run": "run-1", "round": 9, "steps": 99}),
        ("started", {"study": STUDY, "run": "run-1", "round": 9, "steps": -2}),
        ("started", {"study": STUDY, "run": "run-9", "round": 9, "steps": 1}),
        ("adopted", {"study": STUDY, "run": "run-2", "from": "run-1"}),
        ("reserved", {"study": OTHER, "run": "run-1", "steps": 2}),
        ("reserved", {"study": OTHER, "run": "r", **TERMS}),
        ("reserved", {"study": OTHER, "run": "r", **TERMS, **NONE, "noise_multiplier": 0}),
        ("reserved", {"study": OTHER, "run": "r", **TERMS, **NONE, "steps": 0}),
    ],
)  # fmt: skip
def test_well_chained_nonsense_is_named(
    filled: Ledger, path: Path, kind: str, body: dict[str, object]
) -> None:
    forge(path, kind, **body)
    with raises(LedgerDamaged, match="Entry 6 breaks a rule"):
        filled.verify()


def test_cutting_the_end_off_shows_in_the_head(filled: Ledger, path: Path) -> None:
    head = filled.head()
    rewrite(path, "DELETE FROM entries WHERE seq = 5")
    filled.verify()
    assert filled.head() != head


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET hash = ''",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries VALUES (2, '{}', '')",
        "INSERT INTO entries VALUES (9, '{}', '')",
        "INSERT INTO entries VALUES (NULL, '{}', '')",
    ],
)
def test_triggers_refuse_changes(filled: Ledger, path: Path, statement: str) -> None:
    with (
        contextlib.closing(sqlite3.connect(path)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="append only"),
    ):
        connection.execute(statement)
    filled.verify()


def test_triggers_taken_away_are_missed(filled: Ledger, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_update")
    with raises(LedgerDamaged, match="tables or triggers"):
        filled.verify()


@pytest.mark.parametrize("content", [b"no database, but long enough" * 100, b"SQLite format 3\0"])
def test_another_file_is_refused_without_quoting_the_path(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with raises(LedgerDamaged) as caught:
        Ledger.open(path, delta=1e-6)
    assert str(path) not in str(caught.value)
    assert path.name not in str(caught.value)


def test_a_link_is_not_followed(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    with raises(LedgerDamaged):
        Ledger.open(link, delta=1e-6)


def test_a_full_disk_refuses_and_loses_nothing(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(ledger)
    head = ledger.head()
    connect = sqlite3.connect

    def small(*arguments: object, **keywords: object) -> sqlite3.Connection:
        connection = connect(*arguments, **keywords)  # type: ignore[call-overload]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        ledger.shut()
        fill = (ledger.start_round(STUDY, "run-1", number, 1) for number in range(1, STEPS))
        with raises(LedgerDamaged, match="cannot be read or written"):
            list(fill)
    assert ledger.head()[0] >= head[0]
    ledger.verify()
    started = ledger.reservations()[0].started
    assert ledger.start_round(STUDY, "run-1", 99, 1).started == started + 1


# Other processes.

PRELUDE = """
import sys, os
from pathlib import Path
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.errors import CloisterError
from cloister_fl.privacy.dp_events import Mechanism
ledger = Ledger.open(Path(sys.argv[1]), delta=1e-6)
noise = Mechanism(float(sys.argv[2]), 1.0)
"""


def spawn(path: Path, body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + body, str(path), str(NOISE.noise_multiplier)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_race_for_the_last_of_it(path: Path) -> None:
    body = f"""
print("ready", flush=True)
study = sys.stdin.readline().strip()
try:
    ledger.reserve(study, "run-1", noise, {STEPS}, {DELTA}, 3.0, 4.5)
    print("reserved")
except CloisterError as error:
    print(error.code)
"""
    Ledger.open(path, delta=1e-6)
    racers = [spawn(path, body) for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer, study in zip(racers, (STUDY, OTHER), strict=True):
        assert racer.stdin is not None
        racer.stdin.write(study + "\n")
        racer.stdin.flush()
    said = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert said == ["CLO-301", "reserved"]
    ledger = Ledger.open(path, delta=1e-6)
    assert [entry.kind for entry in ledger.entries()] == ["created", "reserved"]


def test_a_round_that_two_processes_start_is_started_once(ledger: Ledger, path: Path) -> None:
    """The second asks while the first has read the ledger and not yet written to it."""
    slow = f"""
from cloister_fl.client.ledger import ledger_file as module
honest = module.append
def append(*given):
    print("inside", flush=True)
    sys.stdin.readline()
    return honest(*given)
module.append = append
ledger.start_round("{STUDY}", "run-1", 1, 4)
print("started")
"""
    second = f"""
print("ready", flush=True)
sys.stdin.readline()
print("asks", flush=True)
try:
    ledger.start_round("{STUDY}", "run-1", 1, 4)
    print("started")
except CloisterError as error:
    print(error.code)
"""
    reserve(ledger)
    other = spawn(path, second)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "ready\n"
    holder = spawn(path, slow)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "inside\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    assert other.stdout.readline() == "asks\n"
    time.sleep(0.5)
    assert other.poll() is None
    assert holder.communicate("go\n", timeout=60)[0] == "started\n"
    assert other.communicate(timeout=60)[0] == "CLO-305\n"
    assert ledger.spent() == ((NOISE, 4),)


@pytest.mark.slow
def test_kill_after_every_line_never_refunds(path: Path) -> None:
    """A process is killed (SIGKILL) after each thing it did; what it said it did is there."""
    body = f"""
ledger.reserve("{STUDY}", "run-1", noise, {STEPS}, {DELTA}, 3.0, 8.0)
print("reserved", flush=True)
sys.stdin.readline()
for number in range(1, 5):
    ledger.start_round("{STUDY}", "run-1", number, 4)
    print("started", number, flush=True)
    sys.stdin.readline()
"""
    for lines in range(1, 4):
        path.unlink(missing_ok=True)
        process = spawn(path, body)
        assert process.stdin is not None
        assert process.stdout is not None
        for line in range(lines):
            process.stdout.readline()
            if line + 1 < lines:
                process.stdin.write("\n")
                process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        ledger = Ledger.open(path, delta=1e-6)
        assert reserve(ledger).started == 4 * (lines - 1)
        for number in range(1, lines):
            with pytest.raises(RoundAlreadySpent):
                ledger.start_round(STUDY, "run-1", number, 4)
        ledger.start_round(STUDY, "run-1", lines, 4)


def test_kill_inside_the_transaction_leaves_the_ledger_sound(path: Path) -> None:
    """Killed while a start is written and not yet committed: as if it had never been asked."""
    body = f"""
from cloister_fl.client.ledger import ledger_file as ledger_schema
ledger.reserve("{STUDY}", "run-1", noise, {STEPS}, {DELTA}, 3.0, 8.0)
with ledger_schema.transaction(Path(sys.argv[1])) as connection:
    connection.execute("PRAGMA cache_spill = 1")
    for number in range(400):
        ledger_schema.append(connection, "started", {{"study": "{STUDY}", "pad": "x" * 20000}})
    print("written", flush=True)
    sys.stdin.readline()
"""
    process = spawn(path, body)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert Path(f"{path}-journal").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ledger = Ledger.open(path, delta=1e-6)
    ledger.verify()
    assert [entry.kind for entry in ledger.entries()] == ["created", "reserved"]
    ledger.start_round(STUDY, "run-1", 1, 1)


class Model(RuleBasedStateMachine):
    """The ledger against a dictionary that cannot forget."""

    studies = st.sampled_from([STUDY, OTHER])
    runs = st.sampled_from(["r1", "r2", "r3"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger.open(Path(self.folder.name) / "l", delta=1e-6)
        self.started: dict[tuple[str, str], dict[int, int]] = {}
        self.held: dict[tuple[str, str], int] = {}
        self.last = self.ledger.head()

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule()
    def restart(self) -> None:
        self.ledger = Ledger.open(Path(self.folder.name) / "l", delta=1e-6)
        assert self.ledger.head() == self.last

    @rule(study=studies, run=runs)
    def ask(self, study: str, run: str) -> None:
        with contextlib.suppress(BudgetExhausted):
            held = reserve(self.ledger, study, run, epsilon_limit_study=4.5)
            if (study, run) not in self.held:
                for other in [key for key in self.held if key[0] == study]:
                    if not self.started.get(other):
                        del self.held[other]
                        break
            self.held[study, run] = held.steps

    @rule(study=studies, run=runs, number=st.integers(1, 6), steps=st.integers(1, 9))
    def start(self, study: str, run: str, number: int, steps: int) -> None:
        rounds = self.started.setdefault((study, run), {})
        allowed = self.held.get((study, run), 0) - sum(rounds.values())
        try:
            self.ledger.start_round(study, run, number, steps)
        except RoundAlreadySpent:
            assert number in rounds
        except BudgetExhausted:
            assert steps > allowed
        else:
            assert number not in rounds
            assert steps <= allowed
            rounds[number] = steps

    @invariant()
    def adds_up(self) -> None:
        total = sum(sum(rounds.values()) for rounds in self.started.values())
        assert self.ledger.spent() == compose(((NOISE, total),))
        assert self.ledger.spent(reserved=True) == compose(((NOISE, sum(self.held.values())),))
        assert self.ledger.epsilon_lifetime(reserved=True) <= 8.0
        for study in (STUDY, OTHER):
            assert self.ledger.epsilon_study(study, DELTA, reserved=True) <= 4.5
        head = self.ledger.head()
        assert head[0] >= self.last[0]
        self.last = head


def test_any_history_adds_up() -> None:
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_nothing_but_studies_is_written(filled: Ledger) -> None:
    reserve(filled, OTHER, release=Mechanism(9.0, 1.0), epsilon_limit_study=9.0)
    filled.start_release(OTHER, "run-1")
    filled.close(OTHER, STEWARD)
    filled.accept(0, STEWARD, log=LOG)
    filled.link("1" * 64, {OTHER: ((NOISE, 2),)})
    filled.continue_in("2" * 64)
    every, run = {"kind", "salt", "seq", "time"}, {"study", "run"}
    reserved = {"noise_multiplier", "sampling_rate", "steps", "delta", "limit_study"}
    fields = {
        "created": {"version", "delta", "orders", "id"},
        "reserved": run
        | reserved
        | {"limit_lifetime", "release_noise_multiplier", "release_unstarted"},
        "started": run | {"round", "steps"},
        "evaluated": run,
        "closed": {"study", "released", "key", "signature"},
        "accepted": {"missed", "log_seq", "log_hash", "claimed", "key", "signature"},
        "linked": {"ledger", "steps"},
        "continued": {"ledger"},
    }
    assert {entry.kind for entry in filled.entries()} == set(fields)
    for entry in filled.entries():
        # All of them, always: no form but one is read.
        assert set(entry.body) == every | fields[entry.kind]
        json.dumps(dict(entry.body), allow_nan=False)


def test_the_end_of_a_run_releases_what_was_decided_beforehand(ledger: Ledger, path: Path) -> None:
    reserve(ledger, releases_unstarted=True)
    ledger.start_round(STUDY, "run-1", 1, 5)
    before = ledger.epsilon_lifetime(reserved=True)
    assert ledger.end(STUDY, "run-1", STEWARD) == STEPS - 5
    assert ledger.epsilon_lifetime(reserved=True) == ledger.epsilon_lifetime() < before
    (held,) = ledger.reservations()
    assert (held.started, held.rounds, held.given_up) == (5, 1, ((NOISE, STEPS - 5),))
    # For good, and in one entry: nothing of the study starts or is reserved any more.
    assert [entry.kind for entry in ledger.entries()][-2:] == ["started", "closed"]
    for again in (
        lambda: ledger.start_round(STUDY, "run-1", 2, 5),
        lambda: reserve(ledger, run="run-2"),
    ):
        with pytest.raises(BudgetExhausted, match="closed"):
            again()
    head = ledger.head()
    assert ledger.end(STUDY, "run-1", STEWARD) == 0
    assert ledger.head() == head
    assert Ledger.open(path, delta=1e-6).reservations() == ledger.reservations()


def test_a_policy_that_changes_after_the_reservation_releases_nothing(ledger: Ledger) -> None:
    reserve(ledger)
    reserve(ledger, releases_unstarted=True)
    ledger.start_round(STUDY, "run-1", 1, 5)
    head = ledger.head()
    assert ledger.end(STUDY, "run-1", STEWARD) == 0
    assert ledger.head() == head
    assert ledger.start_round(STUDY, "run-1", 2, 5).left == 10


def test_who_has_no_reservation_ends_nothing(ledger: Ledger) -> None:
    reserve(ledger, releases_unstarted=True)
    with pytest.raises(BudgetExhausted, match="no reservation"):
        ledger.end(STUDY, "run-2", STEWARD)
    assert ledger.reservations()[0].left == STEPS
