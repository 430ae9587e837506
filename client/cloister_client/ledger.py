"""The hospital's privacy ledger: what its patients have been promised, and what is used up.

Privacy is spent before it is used. Approval of a study reserves all its steps, atomically, against
two gates: the study's epsilon (privacy-loss distribution, parameters fixed beforehand) and the
lifetime's (Renyi filter, valid for studies chosen after earlier results). Each round then marks its
steps as started, on disk, before data are read. Started is spent: a crash never refunds, and the
same round is not trained twice. Nothing here knows a patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister_client.ledger_schema import (
    PROTOCOL_KINDS,
    Entry,
    append,
    create_file,
    damaged,
    install,
    read,
    transaction,
)
from cloister_common.errors import BudgetExhausted, InternalError, PolicyRefused, RoundAlreadySpent
from cloister_common.privacy.accounting import epsilon_of
from cloister_common.privacy.events import Composition, Mechanism, compose
from cloister_common.privacy.filter import ORDERS, lifetime_epsilon, would_fit

__all__ = ["Entry", "Ledger", "Reservation"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Reservation:
    """Steps that a run of a study may take at this site.

    Attributes:
        study_digest: hash of the study, 64 hexadecimal digits.
        run_id: the run that holds it.
        mechanism: what each step is.
        steps: how many were reserved.
        delta: the study's delta.
        started: how many were started; they are spent.
    """

    study_digest: str
    run_id: str
    mechanism: Mechanism
    steps: int
    delta: float
    started: int

    @property
    def left(self) -> int:
        """Steps that may still be started."""
        return self.steps - self.started


@dataclass
class _Account:
    """A reservation while the entries are read."""

    study: str
    run: str
    mechanism: Mechanism
    steps: int
    delta: float
    rounds: dict[int, int] = field(default_factory=dict)

    @property
    def started(self) -> int:
        return sum(self.rounds.values())

    def composition(self, reserved: bool) -> Composition:
        return ((self.mechanism, self.steps if reserved else self.started),)

    def frozen(self) -> Reservation:
        return Reservation(
            self.study, self.run, self.mechanism, self.steps, self.delta, self.started
        )


@dataclass
class _State:
    """What the entries add up to."""

    orders: tuple[float, ...]
    delta: float
    accounts: dict[tuple[str, str], _Account] = field(default_factory=dict)

    def composition(self, *, reserved: bool, study: str | None = None) -> Composition:
        return compose(
            *(
                account.composition(reserved)
                for account in self.accounts.values()
                if study is None or account.study == study
            )
        )


class Ledger:
    """A hospital's ledger; make it with ``open``.

    Every call reads and checks the whole file, so no other process and no kill makes it forget.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def open(cls, path: Path, *, delta: float) -> Ledger:
        """Open the ledger at ``path``, or make it; and check it.

        Args:
            path: its file; the folder must exist.
            delta: of the lifetime's promise. A new ledger fixes it, and the filter's orders, for
                good.

        Raises:
            LedgerDamaged: the file is no sound ledger.
            PolicyRefused: the ledger was made for another delta.
        """
        if not 0 < delta < 1:
            raise InternalError("A ledger's delta lies between 0 and 1.")
        create_file(path)
        ledger = cls(path)
        with transaction(path, write=True) as connection:
            if install(connection):
                append(
                    connection, "created", {"version": 1, "delta": delta, "orders": list(ORDERS)}
                )
            state = _replay(read(connection))
        if state.delta != delta:
            raise PolicyRefused(
                f"The ledger was made for delta {state.delta:g}, the policy says {delta:g}.",
                why="A lifetime's delta cannot change while it lasts.",
                remedy=f"Set the lifetime delta in the site's policy to {state.delta:g}.",
            )
        return ledger

    def reserve(
        self,
        study_digest: str,
        run_id: str,
        mechanism: Mechanism,
        steps: int,
        delta: float,
        epsilon_limit_study: float,
        epsilon_limit_lifetime: float,
    ) -> Reservation:
        """Reserve a study's steps against both gates, or refuse; nothing in between.

        Asking again for the same study and run gives the same reservation. A reservation that an
        older run of the study never started is taken over by the new run, so that a run which died
        before its first round costs nothing; the older run can then start nothing.

        Args:
            study_digest: hash of the study.
            run_id: 1 to 128 printable characters without space.
            mechanism: noise multiplier and sampling rate of each step.
            steps: all steps of the study, 1 or more.
            delta: the study's delta.
            epsilon_limit_study: the most that all runs of this study together may cost.
            epsilon_limit_lifetime: the most that everything together may cost, at the ledger's
                delta.

        Raises:
            BudgetExhausted: a gate is closed; says what was asked, what is left, and the limit.
            LedgerDamaged: the file is no sound ledger, or cannot be written.
        """
        _require(_DIGEST.fullmatch(study_digest), "a study's hash")
        _require(_RUN.fullmatch(run_id), "a run's name")
        _require(steps >= 1, "a number of steps")
        _require(0 < delta < 1, "a delta")
        _require(epsilon_limit_study >= 0 and epsilon_limit_lifetime >= 0, "a limit")
        wanted = _Account(study_digest, run_id, mechanism, steps, delta)
        with transaction(self._path, write=True) as connection:
            state = _replay(read(connection))
            held = state.accounts.get((study_digest, run_id))
            if held is not None:
                _require_same(held, wanted)
                return held.frozen()
            idle = _make_room(state, wanted)
            _gates(state, wanted, epsilon_limit_study, epsilon_limit_lifetime)
            body: dict[str, Any] = {"study": study_digest, "run": run_id}
            if idle is not None:
                append(connection, "adopted", {**body, "from": idle.run})
            else:
                terms = {
                    "noise_multiplier": mechanism.noise_multiplier,
                    "sampling_rate": mechanism.sampling_rate,
                    "steps": steps,
                    "delta": delta,
                    "limit_study": epsilon_limit_study,
                    "limit_lifetime": epsilon_limit_lifetime,
                }
                append(connection, "reserved", {**body, **terms})
        return wanted.frozen()

    def refusal(
        self,
        study_digest: str,
        mechanism: Mechanism,
        steps: int,
        delta: float,
        epsilon_limit_study: float,
        epsilon_limit_lifetime: float,
    ) -> BudgetExhausted | None:
        """What ``reserve`` would say to another run of this study, without reserving; or None."""
        wanted = _Account(study_digest, "?", mechanism, steps, delta)
        state = self._state()
        _make_room(state, wanted)
        try:
            _gates(state, wanted, epsilon_limit_study, epsilon_limit_lifetime)
        except BudgetExhausted as error:
            return error
        return None

    def start_round(
        self, study_digest: str, run_id: str, round_number: int, steps: int
    ) -> Reservation:
        """Spend a round's steps, durably; call it before data are read.

        Args:
            study_digest: hash of the study.
            run_id: the run that holds the reservation.
            round_number: 1, 2, ...; each once, in any order.
            steps: the round's steps, 1 or more.

        Returns:
            The reservation after the round.

        Raises:
            RoundAlreadySpent: the round was started before, perhaps by a process that died.
            BudgetExhausted: the run has no reservation, or not so many steps left.
            LedgerDamaged: the file is no sound ledger, or cannot be written.
        """
        _require(round_number >= 1, "a round")
        _require(steps >= 1, "a number of steps")
        with transaction(self._path, write=True) as connection:
            state = _replay(read(connection))
            account = state.accounts.get((study_digest, run_id))
            if account is None:
                raise BudgetExhausted(
                    "The run has no reservation in the privacy ledger.",
                    remedy="Approve the study; a run that another one replaced cannot go on.",
                )
            if round_number in account.rounds:
                raise RoundAlreadySpent(
                    f"Round {round_number} of this run was already started and is spent.",
                    why="A process that dies in a round never gets its budget back.",
                    remedy="Go on with the next round.",
                )
            left = account.steps - account.started
            if steps > left:
                raise BudgetExhausted(
                    f"The round asks for {steps} steps; {left} of {account.steps} are left.",
                    remedy="The study's budget is used up; approve another study to go on.",
                )
            body = {"study": study_digest, "run": run_id, "round": round_number, "steps": steps}
            append(connection, "started", body)
            account.rounds[round_number] = steps
        return account.frozen()

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, oldest first, after checking them as ``verify`` does."""
        with transaction(self._path, write=False) as connection:
            entries = read(connection)
        _replay(entries)
        return entries

    def verify(self) -> None:
        """Check protection, chain and sums.

        Raises:
            LedgerDamaged: naming the first entry that is wrong.
        """
        self.entries()

    def head(self) -> tuple[int, str]:
        """Return number and hash of the last entry: what the site notes elsewhere."""
        last = self.entries()[-1]
        return last.seq, last.hash

    def reservations(self) -> tuple[Reservation, ...]:
        """Return all reservations in force, oldest first."""
        return tuple(account.frozen() for account in self._state().accounts.values())

    def spent(self, study_digest: str | None = None, *, reserved: bool = False) -> Composition:
        """Return the steps started so far, of one study or of all.

        Args:
            study_digest: only this study.
            reserved: count reserved steps too, as the gates do.
        """
        return self._state().composition(reserved=reserved, study=study_digest)

    def epsilon_study(self, study_digest: str, delta: float, *, reserved: bool = False) -> float:
        """Epsilon of all runs of a study so far, by privacy-loss distribution."""
        return epsilon_of(self.spent(study_digest, reserved=reserved), delta)

    def epsilon_lifetime(self, *, reserved: bool = False) -> float:
        """Epsilon of everything so far, by the Renyi filter, at the ledger's delta and orders."""
        state = self._state()
        spent = state.composition(reserved=reserved)
        return lifetime_epsilon(spent, state.delta, orders=state.orders)

    def _state(self) -> _State:
        return _replay(self.entries())


def _gates(state: _State, wanted: _Account, study_limit: float, lifetime_limit: float) -> None:
    before = state.composition(reserved=True, study=wanted.study)
    asked = wanted.composition(reserved=True)
    cost = epsilon_of(compose(before, asked), wanted.delta)
    if not cost <= study_limit:
        raise _exhausted(
            "study",
            asked=epsilon_of(asked, wanted.delta),
            left=study_limit - epsilon_of(before, wanted.delta),
            limit=study_limit,
        )
    before = state.composition(reserved=True)
    if not would_fit(before, asked, lifetime_limit, state.delta, orders=state.orders):
        raise _exhausted(
            "lifetime",
            asked=lifetime_epsilon(asked, state.delta, orders=state.orders),
            left=lifetime_limit - lifetime_epsilon(before, state.delta, orders=state.orders),
            limit=lifetime_limit,
        )


def _exhausted(gate: str, *, asked: float, left: float, limit: float) -> BudgetExhausted:
    again = gate == "study" and asked <= limit
    return BudgetExhausted(
        f"The {gate} budget does not suffice: the study asks for epsilon {asked:.3f}, "
        f"{max(0.0, left):.3f} of {limit:.3f} is left.",
        why="This very study was run here before. " * again
        + "Everything reserved or started counts, and nothing is refunded.",
        remedy="A trial belongs on a copy of the site folder. Another study has a budget of its "
        "own, within the lifetime's; only the site's steward can raise a limit."
        if again
        else "Ask for a study with a smaller epsilon; only the site's steward can raise a limit.",
    )


def _make_room(state: _State, wanted: _Account) -> _Account | None:
    """Take the reservation out that ``wanted`` would take over, and return it."""
    idle = _idle(state, wanted)
    if idle is not None:
        del state.accounts[idle.study, idle.run]
    return idle


def _idle(state: _State, wanted: _Account) -> _Account | None:
    """The oldest reservation of the same study, on the same terms, of which nothing was started."""
    for account in state.accounts.values():
        if account.study == wanted.study and not account.rounds and _same(account, wanted):
            return account
    return None


def _same(one: _Account, other: _Account) -> bool:
    return (one.mechanism, one.steps, one.delta) == (other.mechanism, other.steps, other.delta)


def _require_same(held: _Account, wanted: _Account) -> None:
    if not _same(held, wanted):
        raise PolicyRefused(
            "The run asks for other terms than it reserved.",
            why="Noise, sampling rate, steps and delta of a study never change.",
            remedy="Start a new run.",
        )


def _require(holds: object, what: str) -> None:
    if not holds:
        raise InternalError(f"The ledger was given {what} that cannot be.")


def _replay(entries: Iterable[Entry]) -> _State:
    """Add the entries up; every rule that held when they were written must hold again."""
    state: _State | None = None
    for entry in entries:
        try:
            state = _apply(state, entry)
        except (KeyError, TypeError, ValueError):
            raise damaged(f"entry {entry.seq} says what no entry can say") from None
    if state is None:
        raise damaged("entry 1 is missing")
    return state


def _apply(state: _State | None, entry: Entry) -> _State:
    body = entry.body
    if state is None:
        orders = tuple(float(order) for order in body["orders"])
        _hold(entry.kind == "created" and body["version"] == 1)
        _hold(0 < body["delta"] < 1 and orders and all(1 < o < math.inf for o in orders))
        return _State(orders, float(body["delta"]))
    if entry.kind in PROTOCOL_KINDS:
        return state
    key = (str(body["study"]), str(body["run"]))
    if entry.kind == "reserved":
        mechanism = Mechanism(float(body["noise_multiplier"]), float(body["sampling_rate"]))
        _hold(key not in state.accounts and body["steps"] >= 1)
        state.accounts[key] = _Account(*key, mechanism, int(body["steps"]), float(body["delta"]))
    elif entry.kind == "adopted":
        account = state.accounts.pop((key[0], str(body["from"])))
        _hold(key not in state.accounts and not account.rounds)
        account.run = key[1]
        state.accounts[key] = account
    elif entry.kind == "started":
        account = state.accounts[key]
        _hold(body["round"] not in account.rounds and body["steps"] >= 1)
        account.rounds[int(body["round"])] = int(body["steps"])
        _hold(account.started <= account.steps)
    else:
        raise ValueError(entry.kind)
    return state


def _hold(rule: object) -> None:
    if not rule:
        raise ValueError("a rule of the ledger does not hold")
