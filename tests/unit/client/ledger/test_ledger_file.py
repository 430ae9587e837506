"""A ledger that is verified once: cheap while it is left alone, and read whole after any change."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cloister_fl.audit_log import EMPTY
from cloister_fl.client.ledger import chain, ledger_file
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.secure_aggregation.exchange import RoundMemory
from cloister_fl.errors import (
    BudgetExhausted,
    CloisterError,
    LedgerDamaged,
    LedgerRolledBack,
    PolicyRefused,
    PrivacyError,
    ReleaseAlreadySpent,
    RoundAlreadySpent,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy.accounting import epsilon_of
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from cloister_fl.privacy.renyi_filter import lifetime_epsilon
from cloister_fl.secagg import Session
from support.errors import raises
from support.tampering import cut, leave_in_wal, overwrite, put_in_place, rewrite_rows

pytestmark = pytest.mark.process

STUDY, OTHER = "a" * 64, "b" * 64
DELTA, LIFETIME_DELTA = 1e-5, 1e-6
NOISE, RELEASE = Mechanism(40.0, 1.0), Mechanism(9.0, 1.0)
STEPS = 400
STEWARD = Identity.generate()


class Count:
    """How often a ledger was opened and read whole."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.connects = self.reads = 0
        connect, read = sqlite3.connect, chain.read

        def connecting(*given: Any, **named: Any) -> sqlite3.Connection:
            self.connects += 1
            return connect(*given, **named)  # type: ignore[no-any-return]

        def reading(connection: sqlite3.Connection) -> tuple[chain.Entry, ...]:
            self.reads += 1
            return read(connection)

        patch.setattr(sqlite3, "connect", connecting)
        patch.setattr(chain, "read", reading)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    """Three rounds of one study are charged."""
    made = Ledger.open(path, delta=LIFETIME_DELTA, pinned=True)
    reserve(made)
    for number in (1, 2, 3):
        made.start_round(STUDY, "run", number, 2)
    return made


def reserve(ledger: Ledger, study: str = STUDY, run: str = "run", **other: Any) -> None:
    terms: dict[str, Any] = {"mechanism": NOISE, "steps": STEPS, "delta": DELTA}
    terms |= {"epsilon_limit_study": 9.0, "epsilon_limit_lifetime": 50.0, **other}
    ledger.reserve(study, run, **terms)


def opened(path: Path) -> Ledger:
    return Ledger.open(path, delta=LIFETIME_DELTA)


def test_what_nobody_else_touched_is_read_once_and_over_one_connection(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(monkeypatch)
    for number in range(4, 20):
        ledger.start_round(STUDY, "run", number, 2)
        assert ledger.head().seq == number + 2
        reserve(ledger)
        assert ledger.is_as_verified()
    assert ledger.spent() == ((NOISE, 38),)
    assert (count.connects, count.reads) == (0, 0)
    ledger.verify()
    assert (count.connects, count.reads) == (1, 1)


# What another process does between two calls, times set back.


def a_byte(path: Path) -> None:
    overwrite(path, b'"round":2', b'"round":9')


def a_byte_of_the_last_entry(path: Path) -> None:
    overwrite(path, b'"round":3', b'"round":9')


def a_row(path: Path) -> None:
    rewrite_rows(path, "UPDATE entries SET body = replace(body, ':2', ':1') WHERE seq = 4")


def a_deleted_row(path: Path) -> None:
    rewrite_rows(path, "DELETE FROM entries WHERE seq = 4")


def the_last_row(path: Path) -> None:
    rewrite_rows(path, "DELETE FROM entries WHERE seq = 5")


def a_replaced_row(path: Path) -> None:
    rewrite_rows(
        path,
        "UPDATE entries SET body = (SELECT e.body FROM entries e WHERE e.seq = 3), "
        "hash = (SELECT e.hash FROM entries e WHERE e.seq = 3) WHERE seq = 4",
    )


def a_dropped_trigger(path: Path) -> None:
    rewrite_rows(path, "CREATE TABLE other (x)")


def pages(path: Path) -> None:
    cut(path, 4096)


def a_row_in_the_wal(path: Path) -> None:
    leave_in_wal(path, "DROP TRIGGER no_delete", "DELETE FROM entries WHERE seq = 5")


TAMPERED: list[Callable[[Path], None]] = [
    a_byte,
    a_byte_of_the_last_entry,
    a_row,
    a_deleted_row,
    the_last_row,
    a_replaced_row,
    a_dropped_trigger,
    pages,
    a_row_in_the_wal,
]


@pytest.mark.parametrize("tamper", TAMPERED)
@pytest.mark.parametrize("use", ["start_round", "reserve", "head", "spent"])
def test_whatever_else_changed_the_file_is_found_before_the_next_use(
    ledger: Ledger, path: Path, tamper: Callable[[Path], None], use: str
) -> None:
    before = path.stat().st_mtime_ns
    tamper(path)
    if tamper is not a_row_in_the_wal:
        assert path.stat().st_mtime_ns == before
    assert not ledger.is_as_verified()
    content = path.read_bytes()
    for _ in range(2):  # It stays so.
        with pytest.raises(PrivacyError) as caught:
            {
                "start_round": lambda: ledger.start_round(STUDY, "run", 4, 2),
                "reserve": lambda: reserve(ledger, OTHER),
                "head": ledger.head,
                "spent": ledger.spent,
            }[use]()
        assert caught.value.code in {LedgerDamaged.code, LedgerRolledBack.code}
    if tamper is not a_row_in_the_wal:  # Its last reader moves it into the file.
        assert path.read_bytes() == content


def test_a_byte_of_the_write_ahead_log_is_found(ledger: Ledger, path: Path) -> None:
    # In this mode the newest entries stand in the log alone.
    log = leave_in_wal(path, "CREATE TABLE passing (x)", "DROP TABLE passing")
    ledger.start_round(STUDY, "run", 4, 2)
    ledger.start_round(STUDY, "run", 5, 2)
    assert log.stat().st_size > 0
    assert ledger.is_as_verified()
    overwrite(log, b'"round":5', b'"round":9')
    assert not ledger.is_as_verified()
    with raises(LedgerDamaged, match="Entry 7 does not have the hash"):
        ledger.start_round(STUDY, "run", 6, 2)


def test_a_ledger_in_another_s_place_is_read_whole(
    ledger: Ledger, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(path, tmp_path / "same")
    ledger.start_round(STUDY, "run", 4, 2)
    shutil.copy(path, tmp_path / "newest")
    count = Count(monkeypatch)
    put_in_place(path, tmp_path / "newest")
    ledger.start_round(STUDY, "run", 5, 2)
    assert (count.connects, count.reads) == (1, 1)
    put_in_place(path, tmp_path / "same")
    with raises(LedgerRolledBack, match="lacks entry 7"):
        ledger.start_round(STUDY, "run", 6, 2)
    # One that is not pinned takes it for what it is: an older ledger, sound in itself.
    loose = opened(path)
    assert loose.head().seq == 5
    put_in_place(path, tmp_path / "newest")
    assert loose.head().seq == 6
    put_in_place(path, tmp_path / "same")
    assert loose.start_round(STUDY, "run", 4, 2).started == 8


def test_a_ledger_that_went_on_from_an_older_copy_is_not_the_pinned_one(
    ledger: Ledger, path: Path, tmp_path: Path
) -> None:
    shutil.copy(path, tmp_path / "older")
    ledger.start_round(STUDY, "run", 4, 2)
    put_in_place(path, tmp_path / "older")
    opened(path).start_round(STUDY, "run", 4, 3)
    with raises(LedgerRolledBack, match="entry 6"):
        ledger.head()


def test_a_pin_is_demanded_of_the_file_from_the_start(ledger: Ledger, path: Path) -> None:
    """As of a session that follows another one of the same process."""
    shutil.copy(path, path.with_name("older"))
    ledger.start_round(STUDY, "run", 4, 2)
    pin = ledger.file.pin
    assert pin == ledger.head()
    terms: dict[str, Any] = {"delta": LIFETIME_DELTA, "pinned": True, "pin": pin}
    assert Ledger.open(path, **terms).head() == pin
    put_in_place(path, path.with_name("older"))
    with raises(LedgerRolledBack, match=f"lacks entry {pin.seq} as this process knows it"):
        Ledger.open(path, **terms)
    path.unlink()
    with raises(LedgerDamaged):
        Ledger.open(path, **terms)
    assert not path.exists()


def test_what_another_process_wrote_lawfully_counts(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = opened(path)
    other.start_round(STUDY, "run", 4, 2)
    count = Count(monkeypatch)
    with pytest.raises(RoundAlreadySpent):
        ledger.start_round(STUDY, "run", 4, 2)
    assert (count.connects, count.reads) == (1, 1)
    ledger.start_round(STUDY, "run", 5, 2)
    assert (count.connects, count.reads) == (1, 1)
    other.close(STUDY, STEWARD)
    with raises(BudgetExhausted, match="closed"):
        ledger.start_round(STUDY, "run", 6, 2)
    assert ledger.head() == other.head()


def test_a_commit_in_the_instant_behind_our_own_is_seen(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process commits after our commit, and before we look at the file again."""
    honest = ledger.file._marks
    once: list[int] = []

    def late() -> Any:
        connection = ledger.file._connection
        assert connection is not None
        if not connection.in_transaction and not once:
            once.append(1)
            opened(path).start_round(STUDY, "run", 9, 2)
        return honest()

    ledger.start_round(STUDY, "run", 4, 2)
    monkeypatch.setattr(ledger.file, "_has_marks", lambda: True)
    monkeypatch.setattr(ledger.file, "_marks", late)
    ledger.start_round(STUDY, "run", 5, 2)
    assert once == [1]
    with pytest.raises(RoundAlreadySpent):
        ledger.start_round(STUDY, "run", 9, 2)


def test_an_end_that_is_not_the_verified_one_takes_no_entry(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where no mark tells it."""
    monkeypatch.setattr(ledger.file, "_is_as_seen", lambda: True)
    monkeypatch.setattr(ledger.file, "_has_marks", lambda: True)
    rewrite_rows(path, "DELETE FROM entries WHERE seq = 5")
    with raises(LedgerDamaged, match="last entry is not the one that was read"):
        ledger.start_round(STUDY, "run", 4, 2)
    monkeypatch.undo()
    assert opened(path).head().seq == 4


def test_an_error_leaves_the_state_as_it_was(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(monkeypatch)
    for _ in range(3):
        with pytest.raises(RoundAlreadySpent):
            ledger.start_round(STUDY, "run", 3, 2)
        with pytest.raises(BudgetExhausted):
            reserve(ledger, OTHER, epsilon_limit_lifetime=0.1)
        with pytest.raises(PolicyRefused):
            ledger.close("c" * 64, STEWARD)
    assert (count.connects, count.reads) == (0, 0)
    assert ledger.start_round(STUDY, "run", 4, 2).started == 8


@pytest.mark.parametrize("where", ["append", "commit"])
def test_a_transaction_that_failed_is_not_taken_for_done(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    head = ledger.head()
    honest = ledger.file._sql

    def fails(*given: Any) -> Any:
        if where == "append" or given == ("COMMIT",):
            raise sqlite3.OperationalError("disk I/O error")
        return honest(*given)

    with monkeypatch.context() as patch:
        if where == "append":
            patch.setattr(ledger_file, "append", fails)
        else:
            patch.setattr(ledger.file, "_sql", fails)
        with raises(LedgerDamaged, match="cannot be read or written"):
            ledger.start_round(STUDY, "run", 4, 2)
    assert ledger.head() == head == opened(path).head()
    assert ledger.start_round(STUDY, "run", 4, 2).started == 8


def test_a_database_that_stays_locked_is_an_error_and_no_more(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "_WAIT_SECONDS", 0.1)
    ledger.shut()
    ledger.head()
    holds = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-I", "-S", "-c", holds, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        assert ledger.spent() == ((NOISE, 6),)  # It may still be read.
        with raises(LedgerDamaged, match="cannot be read or written"):
            ledger.start_round(STUDY, "run", 4, 2)
        other.stdin.write("go\n")
    assert ledger.start_round(STUDY, "run", 4, 2).started == 8


def test_threads_take_turns(ledger: Ledger) -> None:
    def start(first: int) -> None:
        for number in range(first, first + 10):
            ledger.start_round(STUDY, "run", number, 1)

    threads = [threading.Thread(target=start, args=(10 * each,)) for each in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.spent() == ((NOISE, 46),)
    ledger.verify()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_reads_anew_and_leaves_its_parent_s_connection_alone(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the middle of a transaction: to close the connection in the child would undo it.
    with ledger.file.transaction(write=True):
        ledger.file.append("epoch", {"study": STUDY, "epoch": "e1"})
        child = multiprocessing.get_context("fork").Process(target=ledger.shut)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert Path(f"{path}-journal").exists()
    assert ledger.head().seq == 6
    count = Count(monkeypatch)

    def charge_over_a_connection_of_its_own() -> None:
        ledger.start_round(STUDY, "run", 4, 2)
        assert (count.connects, count.reads) == (1, 1)

    child = multiprocessing.get_context("fork").Process(target=charge_over_a_connection_of_its_own)
    child.start()
    child.join()
    assert child.exitcode == 0
    with pytest.raises(RoundAlreadySpent):
        ledger.start_round(STUDY, "run", 4, 2)
    assert (count.connects, count.reads) == (1, 1)
    assert ledger.head().seq == 7


def test_a_connection_ends_with_its_ledger(path: Path) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        opened(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


# Whatever the history: what is kept is what a replay of all entries gives.


def recounted(entries: tuple[chain.Entry, ...]) -> dict[str, Any]:
    """What a ledger holds, added up by another program, which reads all entries anew."""
    held: dict[tuple[str, str], dict[str, Any]] = {}
    closed: list[str] = []
    facts: dict[tuple[str, str, object], object] = {}
    for entry in entries[1:]:
        body = entry.body
        key = (str(body.get("study")), str(body.get("run")))
        match entry.kind:
            case "reserved":
                release = body["release_noise_multiplier"]
                held[key] = {
                    "mechanism": Mechanism(body["noise_multiplier"], body["sampling_rate"]),
                    "steps": body["steps"],
                    "release": None if release is None else Mechanism(release, 1.0),
                    "rounds": {},
                    "released": False,
                }
            case "adopted":
                held[key] = held.pop((key[0], body["from"]))
            case "started":
                held[key]["rounds"][body["round"]] = body["steps"]
            case "evaluated":
                held[key]["released"] = True
            case "closed":
                closed.append(key[0])
                for other in [one for (study, _), one in held.items() if study == key[0]]:
                    other["steps"] = sum(other["rounds"].values())
                    if not other["released"]:
                        other["release"] = None
            case "epoch":
                facts["epoch", body["epoch"], None] = True
            case "round":
                facts["round", body["study"], body["sum"]] = body["constants"]
            case "answered":
                facts["answered", body["study"], body["sum"]] = tuple(body["survivors"])

    def total(study: str | None, *, reserved: bool) -> Composition:
        parts: list[Composition] = []
        for (name, _), one in held.items():
            if study in {None, name}:
                steps = one["steps"] if reserved else sum(one["rounds"].values())
                parts.append(((one["mechanism"], steps),))
                if one["release"] is not None and (reserved or one["released"]):
                    parts.append(((one["release"], 1),))
        return compose(*parts)

    made = entries[0].body
    filtered = {
        reserved: lifetime_epsilon(
            total(None, reserved=reserved), made["delta"], orders=tuple(made["orders"])
        )
        for reserved in (False, True)
    }
    return {
        "head": (entries[-1].seq, entries[-1].hash),
        "closed": frozenset(closed),
        "reservations": [
            (*key, one["mechanism"], one["steps"], sum(one["rounds"].values()), one["release"])
            for key, one in held.items()
        ],
        "spent": {(s, r): total(s, reserved=r) for s in STUDIES for r in (False, True)},
        "lifetime": filtered,
        "study": {
            (s, r): epsilon_of(total(s, reserved=r), DELTA)
            for s in STUDIES
            if s
            for r in (False, True)
        },
        "facts": facts,
    }


STUDIES = (None, STUDY, OTHER)


def kept(ledger: Ledger) -> dict[str, Any]:
    """The same of a ledger that follows its entries."""
    with ledger.file.transaction(write=False) as state:
        facts: dict[Any, Any] = {("epoch", epoch, None): True for epoch in state.epochs}
        facts |= {("round", *key): value for key, value in state.constants.items()}
        facts |= {("answered", *key): value for key, value in state.answered.items()}
        assert sum(state.begun.values()) == len(state.epochs)
    return {
        "head": ledger.head(),
        "closed": ledger.closed(),
        "reservations": [
            (one.study_digest, one.run_id, one.mechanism, one.steps, one.started, one.release)
            for one in ledger.reservations()
        ],
        "spent": {(s, r): ledger.spent(s, reserved=r) for s in STUDIES for r in (False, True)},
        "lifetime": {r: ledger.epsilon_lifetime(reserved=r) for r in (False, True)},
        "study": {
            (s, r): ledger.epsilon_study(s, DELTA, reserved=r)
            for s in STUDIES
            if s
            for r in (False, True)
        },
        "facts": facts,
    }


class History(RuleBasedStateMachine):
    """Two ledgers follow one file, as an executor and a steward's command do; a third is new."""

    studies = st.sampled_from([STUDY, OTHER])
    runs = st.sampled_from(["r1", "r2"])
    who = st.sampled_from([0, 1])

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.both = [Ledger.open(self.path, delta=LIFETIME_DELTA, pinned=True) for _ in range(2)]

    def teardown(self) -> None:
        for ledger in self.both:
            ledger.shut()
        self.folder.cleanup()

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (BudgetExhausted, RoundAlreadySpent, ReleaseAlreadySpent):
            pass
        except CloisterError as error:
            if type(error) is not PolicyRefused:
                raise

    @rule(who=who, study=studies, run=runs, few=st.booleans(), release=st.booleans())
    def reserve(self, who: int, study: str, run: str, few: bool, release: bool) -> None:
        terms = {"steps": 6 if few else 9, "release": RELEASE if release else None}
        self._do(lambda: reserve(self.both[who], study, run, **terms))

    @rule(who=who, study=studies, run=runs, number=st.integers(1, 4), steps=st.integers(1, 4))
    def start(self, who: int, study: str, run: str, number: int, steps: int) -> None:
        self._do(lambda: self.both[who].start_round(study, run, number, steps))

    @rule(who=who, study=studies, run=runs)
    def release(self, who: int, study: str, run: str) -> None:
        self._do(lambda: self.both[who].start_release(study, run))

    @rule(who=who, study=studies, sure=st.integers(0, 3))
    def close(self, who: int, study: str, sure: int) -> None:
        if not sure:
            self._do(lambda: self.both[who].close(study, STEWARD))

    @rule(who=who)
    def accept(self, who: int) -> None:
        self.both[who].accept(0, STEWARD, log=EMPTY)

    @rule(who=who, number=st.integers(0, 2), fact=st.sampled_from(["epoch", "round", "answered"]))
    def remember(self, who: int, number: int, fact: str) -> None:
        memory = RoundMemory(
            lambda: self.both[who], subject=bytes(32), is_noised=bool(number), most_epochs=9
        )
        weights = (("a", 1.0), ("b", 1.0))
        session = Session(number, 0, bytes([number // 2]) * 32, 1, 1.0, weights)
        if fact == "epoch":
            memory.claim_epoch(bytes([number]) * 32)
        elif fact == "round":
            memory.open_round(session, bytes([number]) * 32)
        else:
            memory.commit(session, ("a", "b", str(number)))

    @invariant()
    def as_replayed(self) -> None:
        fresh = opened(self.path)
        expected = recounted(fresh.entries())
        assert kept(fresh) == expected
        for ledger in self.both:
            assert kept(ledger) == expected
        json.dumps([dict(entry.body) for entry in fresh.entries()])


def test_what_is_kept_is_what_a_replay_gives() -> None:
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
