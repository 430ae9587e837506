"""The release in the ledger: reserved with the steps, spent once, and its rules hold at replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloister_fl.client.ledger.ledger import Ledger, Reservation
from cloister_fl.client.ledger.ledger_file import append, transaction
from cloister_fl.errors import (
    BudgetExhausted,
    InternalError,
    LedgerDamaged,
    PolicyRefused,
    ReleaseAlreadySpent,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy.accounting import calibrate, epsilon_of
from cloister_fl.privacy.dp_events import Mechanism, compose
from cloister_fl.privacy.renyi_filter import lifetime_epsilon
from support.errors import raises

STUDY, OTHER, DELTA, STEPS = "a" * 64, "b" * 64, 1e-5, 4
RELEASE = Mechanism(calibrate(1.0, DELTA, 1.0, 1), 1.0)
NOISE = Mechanism(calibrate(3.0, DELTA, 1.0, STEPS, ((RELEASE, 1),)), 1.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.sqlite", delta=1e-6)


def reserve(ledger: Ledger, run: str = "run-1", study: str = STUDY, **other: Any) -> Reservation:
    terms: dict[str, Any] = {"mechanism": NOISE, "steps": STEPS, "delta": DELTA}
    terms |= {"epsilon_limit_study": 7.0, "epsilon_limit_lifetime": 30.0, "release": RELEASE}
    return ledger.reserve(study, run, **{**terms, **other})


def test_the_gates_count_the_release(ledger: Ledger) -> None:
    steps = ((NOISE, STEPS),)
    whole = compose(steps, ((RELEASE, 1),))
    assert 2.99 < epsilon_of(whole, DELTA) <= 3.0
    with pytest.raises(BudgetExhausted, match="study budget"):
        reserve(ledger, epsilon_limit_study=(epsilon_of(steps, DELTA) + 3.0) / 2)
    between = (lifetime_epsilon(steps, 1e-6) + lifetime_epsilon(whole, 1e-6)) / 2
    with pytest.raises(BudgetExhausted, match="lifetime budget"):
        reserve(ledger, epsilon_limit_lifetime=between)
    assert len(ledger.entries()) == 1
    held = reserve(ledger, epsilon_limit_study=3.0)
    assert (held.release, held.released) == (RELEASE, False)
    assert ledger.spent(reserved=True) == whole
    assert ledger.spent() == held.spent == ()


def test_it_is_spent_once_and_outlives_the_process(ledger: Ledger, tmp_path: Path) -> None:
    reserve(ledger)
    assert ledger.start_release(STUDY, "run-1").released
    again = Ledger.open(tmp_path / "ledger.sqlite", delta=1e-6)
    assert again.spent() == ((RELEASE, 1),)
    assert again.epsilon_study(STUDY, DELTA) == epsilon_of(((RELEASE, 1),), DELTA) <= 1.0
    with pytest.raises(ReleaseAlreadySpent):
        again.start_release(STUDY, "run-1")
    reserve(again, "run-2")
    with pytest.raises(ReleaseAlreadySpent):
        again.start_release(STUDY, "run-2")
    assert [entry.kind for entry in again.entries()].count("evaluated") == 1
    # Both runs reserved it: nothing that was reserved is counted less than it may cost.
    assert again.spent(reserved=True) == compose(((NOISE, 2 * STEPS),), ((RELEASE, 2),))


def test_a_run_that_released_is_not_taken_over(ledger: Ledger) -> None:
    reserve(ledger)
    assert reserve(ledger, "run-2").run_id == "run-2"
    assert len(ledger.reservations()) == 1
    ledger.start_release(STUDY, "run-2")
    reserve(ledger, "run-3")
    assert [one.released for one in ledger.reservations()] == [True, False]


def test_who_reserved_none_gets_none(ledger: Ledger) -> None:
    reserve(ledger, release=None)
    with pytest.raises(BudgetExhausted, match="reserved nothing for a noised evaluation"):
        ledger.start_release(STUDY, "run-1")
    with pytest.raises(BudgetExhausted, match="no reservation"):
        ledger.start_release(OTHER, "run-1")
    with pytest.raises(PolicyRefused, match="other noise, sampling rate, steps or delta"):
        reserve(ledger)
    with pytest.raises(InternalError):
        reserve(ledger, study=OTHER, release=Mechanism(3.0, 0.5))


def test_closing_gives_back_a_release_that_was_not_made(ledger: Ledger) -> None:
    steward = Identity.generate()
    reserve(ledger)
    ledger.start_round(STUDY, "run-1", 1, 1)
    assert ledger.close(STUDY, steward) == STEPS - 1 + 1
    assert ledger.spent(reserved=True) == ((NOISE, 1),)
    with pytest.raises(BudgetExhausted, match="closed"):
        ledger.start_release(STUDY, "run-1")
    reserve(ledger, study=OTHER)
    ledger.start_release(OTHER, "run-1")
    assert ledger.close(OTHER, steward) == STEPS
    assert ledger.spent(OTHER, reserved=True) == ((RELEASE, 1),)
    ledger.verify()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("evaluated", {"study": STUDY, "run": "run-1"}),  # a second time
        ("evaluated", {"study": STUDY, "run": "run-9"}),  # nothing reserved
        ("evaluated", {"study": OTHER, "run": "run-1"}),  # no release reserved
        ("adopted", {"study": STUDY, "run": "run-9", "from": "run-1"}),  # it was started
    ],
)
def test_an_entry_against_the_rules_is_damage(
    ledger: Ledger, tmp_path: Path, kind: str, body: dict[str, str]
) -> None:
    reserve(ledger)
    reserve(ledger, study=OTHER, release=None)
    ledger.start_release(STUDY, "run-1")
    ledger.verify()
    with transaction(tmp_path / "ledger.sqlite") as connection:
        append(connection, kind, body)
    with raises(LedgerDamaged):
        ledger.verify()
