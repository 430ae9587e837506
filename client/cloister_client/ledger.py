"""The hospital's privacy ledger: what its patients have been promised, and what is used up.

Privacy is spent before it is used. Approval of a study reserves all its steps, atomically, against
two gates: the study's epsilon (privacy-loss distribution, parameters fixed beforehand) and the
lifetime's (Renyi filter, valid for studies chosen after earlier results). Each round then marks its
steps as started, on disk, before data are read. Started is spent: a crash never refunds, and the
same round is not trained twice. Nothing here knows a patient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_client.ledger_schema import Entry, append, create_file, install, read, transaction
from cloister_client.ledger_state import (
    Account,
    Reservation,
    State,
    accept_body,
    close_body,
    replay,
)
from cloister_common.errors import BudgetExhausted, InternalError, PolicyRefused, RoundAlreadySpent
from cloister_common.identity import Identity
from cloister_common.privacy.accounting import epsilon_of
from cloister_common.privacy.events import Composition, Mechanism, compose
from cloister_common.privacy.filter import ORDERS, lifetime_epsilon, would_fit

__all__ = ["Entry", "Ledger", "Quote", "Reservation"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True)
class Quote:
    """What one more run of a study would bring the accounts to, everything reserved counted.

    Attributes:
        study: epsilon of all runs of the study, at the study's delta.
        lifetime: epsilon of everything, at the ledger's delta.
    """

    study: float
    lifetime: float


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
            state = replay(read(connection))
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
        wanted = Account(study_digest, run_id, mechanism, steps, delta)
        with transaction(self._path, write=True) as connection:
            state = replay(read(connection))
            _require_open(state, study_digest)
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
        wanted = Account(study_digest, "?", mechanism, steps, delta)
        state = self._state()
        _make_room(state, wanted)
        try:
            _require_open(state, study_digest)
            _gates(state, wanted, epsilon_limit_study, epsilon_limit_lifetime)
        except BudgetExhausted as error:
            return error
        return None

    def quote(self, study_digest: str, mechanism: Mechanism, steps: int, delta: float) -> Quote:
        """What another run of this study would bring the accounts to; nothing is reserved."""
        wanted = Account(study_digest, "?", mechanism, steps, delta)
        state = self._state()
        _make_room(state, wanted)
        asked = wanted.composition(reserved=True)
        study = compose(state.composition(reserved=True, study=study_digest), asked)
        lifetime = compose(state.composition(reserved=True), asked)
        return Quote(
            epsilon_of(study, delta), lifetime_epsilon(lifetime, state.delta, orders=state.orders)
        )

    def close(self, study_digest: str, steward: Identity) -> int:
        """End a study here: release what it reserved and never started, and start no more of it.

        What was started stays spent. Closing again changes nothing.

        Args:
            study_digest: hash of a study that has reserved something here.
            steward: signs the entry.

        Returns:
            The steps that were released.

        Raises:
            PolicyRefused: the study has no reservation.
            LedgerDamaged: the file is no sound ledger, or cannot be written.
        """
        with transaction(self._path, write=True) as connection:
            entries = read(connection)
            state = replay(entries)
            if study_digest in state.closed:
                return 0
            if not state.of(study_digest):
                raise PolicyRefused(
                    "The study has reserved nothing in this ledger.",
                    remedy="To keep the site out of it: cloister client deny",
                )
            body = close_body(
                study_digest, state.unstarted(study_digest), entries[-1].hash, steward
            )
            append(connection, "closed", body)
        return int(body["released"])

    def accept(self, missed: int, steward: Identity) -> None:
        """Write that the steward takes this ledger for the newest; see ``high_water``."""
        with transaction(self._path, write=True) as connection:
            entries = read(connection)
            replay(entries)
            append(connection, "accepted", accept_body(missed, entries[-1].hash, steward))

    def closed(self) -> frozenset[str]:
        """Hashes of the studies that the steward closed."""
        return frozenset(self._state().closed)

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
            state = replay(read(connection))
            _require_open(state, study_digest)
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
        replay(entries)
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

    def _state(self) -> State:
        return replay(self.entries())


def _gates(state: State, wanted: Account, study_limit: float, lifetime_limit: float) -> None:
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


def _require_open(state: State, study_digest: str) -> None:
    if study_digest in state.closed:
        raise BudgetExhausted(
            "The study is closed at this site.",
            why="The steward closed it, and the steps that it never started were released.",
            remedy="Propose another study; a closed one cannot be opened again.",
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


def _make_room(state: State, wanted: Account) -> Account | None:
    """Take the reservation out that ``wanted`` would take over, and return it."""
    idle = _idle(state, wanted)
    if idle is not None:
        del state.accounts[idle.study, idle.run]
    return idle


def _idle(state: State, wanted: Account) -> Account | None:
    """The oldest reservation of the same study, on the same terms, of which nothing was started."""
    for account in state.accounts.values():
        if account.study == wanted.study and not account.rounds and _same(account, wanted):
            return account
    return None


def _same(one: Account, other: Account) -> bool:
    return (one.mechanism, one.steps, one.delta) == (other.mechanism, other.steps, other.delta)


def _require_same(held: Account, wanted: Account) -> None:
    if not _same(held, wanted):
        raise PolicyRefused(
            "The run asks for other terms than it reserved.",
            why="Noise, sampling rate, steps and delta of a study never change.",
            remedy="Start a new run.",
        )


def _require(holds: object, what: str) -> None:
    if not holds:
        raise InternalError(f"The ledger was given {what} that cannot be.")
