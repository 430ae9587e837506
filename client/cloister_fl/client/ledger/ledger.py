"""Privacy ledger of a hospital: what its patients were promised, and what is used up.

Privacy is spent before it is used. Approval of a study reserves all its steps, atomically, against
two gates: the study's epsilon (privacy-loss distribution, parameters fixed beforehand) and the
lifetime's (Renyi filter, valid for studies chosen after earlier results). Each round then marks its
steps as started, on disk, before data are read. Started is spent: a crash never refunds, and the
same round is not trained twice. Nothing here knows a patient.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_fl.audit_log import Head as LogHead
from cloister_fl.client.ledger.chain import Entry, rolled_back
from cloister_fl.client.ledger.ledger_file import Head, LedgerFile, create
from cloister_fl.client.ledger.limits import idle_of, others_of, require_gates, require_same
from cloister_fl.client.ledger.replay import (
    Account,
    Reservation,
    State,
    apply,
    link_body,
)
from cloister_fl.client.ledger.steward_entries import Acceptance, accept_body, close_body
from cloister_fl.client.site.folder import command_at
from cloister_fl.errors import (
    BudgetExhausted,
    InternalError,
    PolicyRefused,
    ReleaseAlreadySpent,
    RoundAlreadySpent,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy.accounting import epsilon_of
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from cloister_fl.privacy.renyi_filter import ORDERS, lifetime_epsilon

__all__ = ["Entry", "Head", "Ledger", "Quote", "Reservation"]

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

    The whole file is read and checked at first, and again by the call after any change of it that
    was not made here (``ledger_file``), so no other process and no kill makes it forget.

    Attributes:
        file: its file; secure aggregation keeps entries of its own there, which spend nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        pinned: bool = False,
        pin: Head | None = None,
        signer: bytes | None = None,
    ) -> None:
        self._path = path
        self._signer = signer
        self.file = LedgerFile(path, apply, pinned=pinned, pin=pin)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        delta: float,
        pinned: bool = False,
        pin: Head | None = None,
        signer: bytes | None = None,
    ) -> Ledger:
        """Open the ledger at ``path``, or make it; and check it.

        Args:
            path: its file; the folder must exist.
            delta: of the lifetime's promise. A new ledger fixes it, and the filter's orders, for
                good.
            pinned: whether to refuse, from then on, a file that lacks what was read or written
                here, with LedgerRolledBack.
            pin: the entry that the file must have from the start, where it is pinned; then no file
                is made.
            signer: the site's public key. Nothing is reserved or spent in a ledger with entries
                that another key signed, see ``foreign``. None takes any key.

        Raises:
            LedgerDamaged: the file is no sound ledger.
            LedgerRolledBack: it lacks the pin.
            PolicyRefused: the ledger was made for another delta.
        """
        if not 0 < delta < 1:
            raise InternalError("The delta of a ledger must be between 0 and 1.")
        if pin is None:
            # The id tells it from other ledgers of the machine made in the same second.
            made = {
                "version": 1,
                "delta": delta,
                "orders": list(ORDERS),
                "id": secrets.token_hex(16),
            }
            create(path, "created", made)
        ledger = cls(path, pinned=pinned, pin=pin, signer=signer)
        with ledger.file.transaction(write=False) as state:
            made_for = state.delta
        if made_for != delta:
            ledger.shut()
            raise PolicyRefused(
                f"The ledger was made for delta {made_for:g}, the policy says {delta:g}.",
                why="The delta of a ledger's lifetime cannot change.",
                remedy=f"Set policy.ledger_delta in site.toml to {made_for:g}.",
            )
        return ledger

    def shut(self) -> None:
        """Close the file; the next call opens and checks it anew."""
        self.file.close()

    def reserve(
        self,
        study_digest: str,
        run_id: str,
        mechanism: Mechanism,
        steps: int,
        delta: float,
        epsilon_limit_study: float,
        epsilon_limit_lifetime: float,
        *,
        release: Mechanism | None = None,
        releases_unstarted: bool = False,
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
            release: of the study's release, sampling rate 1; reserved with the steps.
            releases_unstarted: whether the end of the run is to release what it did not start, see
                ``end``; noted with the reservation, for it must be decided beforehand.

        Raises:
            BudgetExhausted: a gate is closed; says what was asked, what is left, and the limit.
            LedgerDamaged: the file is no sound ledger, or cannot be written.
            LedgerRolledBack: another key signed an entry, see ``foreign``.
        """
        _require(_DIGEST.fullmatch(study_digest), "study's hash")
        _require(_RUN.fullmatch(run_id), "run's name")
        _require(steps >= 1, "number of steps")
        _require(0 < delta < 1, "delta")
        _require(epsilon_limit_study >= 0 and epsilon_limit_lifetime >= 0, "limit")
        _require(release is None or release.sampling_rate == 1, "noised evaluation")
        wanted = Account(study_digest, run_id, mechanism, steps, delta, release)
        with self.file.transaction(write=True) as state:
            self._require_own(state)
            state.require_open(study_digest)
            held = state.accounts.get((study_digest, run_id))
            if held is not None:
                require_same(held, wanted)
                return held.frozen()
            state.require_here()
            idle = idle_of(state, wanted)
            require_gates(state, wanted, epsilon_limit_study, epsilon_limit_lifetime)
            body: dict[str, Any] = {"study": study_digest, "run": run_id}
            if idle is not None:
                self.file.append("adopted", {**body, "from": idle.run})
            else:
                terms = {
                    "noise_multiplier": mechanism.noise_multiplier,
                    "sampling_rate": mechanism.sampling_rate,
                    "steps": steps,
                    "delta": delta,
                    "limit_study": epsilon_limit_study,
                    "limit_lifetime": epsilon_limit_lifetime,
                    "release_noise_multiplier": release and release.noise_multiplier,
                    "release_unstarted": releases_unstarted,
                }
                self.file.append("reserved", {**body, **terms})
        return wanted.frozen()

    def refusal(
        self,
        study_digest: str,
        mechanism: Mechanism,
        steps: int,
        delta: float,
        epsilon_limit_study: float,
        epsilon_limit_lifetime: float,
        *,
        release: Mechanism | None = None,
    ) -> BudgetExhausted | None:
        """What ``reserve`` would say to another run of this study, without reserving; or None."""
        wanted = Account(study_digest, "?", mechanism, steps, delta, release)
        try:
            with self.file.transaction(write=False) as state:
                state.require_open(study_digest)
                state.require_here()
                require_gates(state, wanted, epsilon_limit_study, epsilon_limit_lifetime)
        except BudgetExhausted as error:
            return error
        return None

    def quote(
        self,
        study_digest: str,
        mechanism: Mechanism,
        steps: int,
        delta: float,
        *,
        release: Mechanism | None = None,
    ) -> Quote:
        """What another run of this study would bring the accounts to; nothing is reserved."""
        wanted = Account(study_digest, "?", mechanism, steps, delta, release)
        with self.file.transaction(write=False) as state:
            study = compose(others_of(state, wanted, study_digest), wanted.reserved)
            lifetime = compose(others_of(state, wanted, None), wanted.reserved)
            return Quote(
                epsilon_of(study, delta),
                lifetime_epsilon(lifetime, state.delta, orders=state.orders),
            )

    def close(self, study_digest: str, steward: Identity) -> int:
        """End a study here: release what it reserved and never started, and start no more of it.

        What was started stays spent. Closing again changes nothing.

        Args:
            study_digest: hash of a study that has reserved something here.
            steward: signs the entry.

        Returns:
            The steps that were released; the release of its figures is one.

        Raises:
            PolicyRefused: the study has no reservation.
            LedgerDamaged, LedgerRolledBack: see ``reserve``.
        """
        with self.file.transaction(write=True) as state:
            self._require_own(state)
            if study_digest in state.closed:
                return 0
            if not state.of(study_digest):
                raise PolicyRefused(
                    "The study has no reservation in this ledger, so there is nothing to close.",
                    remedy="To keep this site out of the study: "
                    + command_at(self._path.parent, f"deny {study_digest[:16]} --why '...'"),
                )
            return self._close(state, study_digest, steward)

    def end(self, study_digest: str, run_id: str, signer: Identity) -> int:
        """Close the study of a run that has ended, where that was decided when it was reserved.

        Where every run of the study here was reserved so, and this is one of them: what was not
        started is released, and no more of the study starts, in one entry. Ending again changes
        nothing.

        Args:
            study_digest, run_id: of a run that has a reservation here.
            signer: signs the entry.

        Returns:
            The steps that were released, see ``close``.

        Raises:
            BudgetExhausted: the run has no reservation.
            LedgerDamaged, LedgerRolledBack: see ``reserve``.
        """
        with self.file.transaction(write=True) as state:
            self._require_own(state)
            if study_digest in state.closed:
                return 0
            state.account(study_digest, run_id)
            if not all(account.releases_unstarted for account in state.of(study_digest)):
                return 0
            return self._close(state, study_digest, signer)

    def _close(self, state: State, study_digest: str, signer: Identity) -> int:
        released = state.unstarted(study_digest)
        previous = self.file.last.hash
        self.file.append("closed", close_body(study_digest, released, previous, signer))
        return released

    def accept(
        self, missed: int, steward: Identity, *, log: LogHead, claimed: frozenset[str] = frozenset()
    ) -> None:
        """Write that the steward takes this ledger for the newest; see ``accept_body``."""
        with self.file.transaction(write=True):
            previous = self.file.last.hash
            body = accept_body(missed, previous, steward, log=log, claimed=claimed)
            self.file.append("accepted", body)

    def accepted(self) -> tuple[Acceptance, ...]:
        """The acceptances that ``signer`` signed, oldest first."""
        with self.file.transaction(write=False) as state:
            return state.accepted(self._signer)

    def foreign(self) -> tuple[int, ...]:
        """Numbers of the entries that another key than ``signer`` signed, but for those before
        the last acceptance by ``signer``."""
        with self.file.transaction(write=False) as state:
            return state.foreign(self._signer)

    def _require_own(self, state: State) -> None:
        foreign = state.foreign(self._signer)
        if foreign:
            raise rolled_back(
                self._path.parent,
                f"Entry {foreign[0]} of the privacy ledger is not signed by this site.",
                "Somebody else wrote it, or the ledger comes from a folder with another key.",
            )

    def continue_in(self, other: str) -> None:
        """Reserve nothing more here: another ledger counts these patients. Can be repeated.

        What is reserved can still be started, so no run that goes on ends by it.

        Args:
            other: ``machine_registry.ledger_id`` of that ledger.

        Raises:
            PolicyRefused: it is continued in a third one.
        """
        with self.file.transaction(write=True) as state:
            if state.continued == other:
                return
            if state.continued:
                raise PolicyRefused(
                    "The ledger to link is continued in another site folder already.",
                    remedy="Link that folder, which counts this ledger's spending.",
                )
            self.file.append("continued", {"ledger": other})

    def link(self, other: str, spending: Mapping[str, Composition]) -> bool:
        """Count another ledger's spending on the same patients, for good.

        Args:
            other: its id, see ``machine_registry.ledger_id``.
            spending: all that it may come to spend, by study; it can reserve no more by then.

        Returns:
            Whether it was not linked before.
        """
        with self.file.transaction(write=True) as state:
            if other in state.linked:
                return False
            self.file.append("linked", link_body(other, spending))
        return True

    def linked(self) -> frozenset[str]:
        """Ids of the ledgers whose spending counts here."""
        with self.file.transaction(write=False) as state:
            return frozenset(state.linked)

    def continued(self) -> str:
        """Id of the ledger that counts this one's spending; empty for none."""
        with self.file.transaction(write=False) as state:
            return state.continued

    def spending(self) -> dict[str, Composition]:
        """All that is reserved or started, by study; linked ledgers' too."""
        with self.file.transaction(write=False) as state:
            studies = {one: state.reserved.of(one) for one in state.reserved.studies()}
        return {study: spent for study, spent in studies.items() if spent}

    def closed(self) -> frozenset[str]:
        """Hashes of the studies that the steward closed."""
        with self.file.transaction(write=False) as state:
            return frozenset(state.closed)

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
            LedgerDamaged, LedgerRolledBack: see ``reserve``.
        """
        _require(round_number >= 1, "round")
        _require(steps >= 1, "number of steps")
        with self.file.transaction(write=True) as state:
            self._require_own(state)
            account = state.account(study_digest, run_id)
            if round_number in account.rounds:
                raise RoundAlreadySpent(
                    f"Round {round_number} of this run was already started and is spent.",
                    why="What a process that died in a round had charged stays charged.",
                    remedy="Continue with the next round.",
                )
            left = account.steps - account.started
            if steps > left:
                raise BudgetExhausted(
                    f"The round asks for {steps} steps; {left} of {account.steps} are left.",
                    remedy="The study's budget is used up; approve another study to go on.",
                )
            body = {"study": study_digest, "run": run_id, "round": round_number, "steps": steps}
            self.file.append("started", body)
        return account.frozen()

    def start_release(self, study_digest: str, run_id: str) -> Reservation:
        """Spend the study's one noised evaluation, durably; call it before data are read.

        Args:
            study_digest: hash of the study.
            run_id: the run that holds the reservation.

        Returns:
            The reservation after it.

        Raises:
            ReleaseAlreadySpent: a run of this study charged it before.
            BudgetExhausted: the run has no reservation, or none for a noised evaluation.
            LedgerDamaged, LedgerRolledBack: see ``reserve``.
        """
        with self.file.transaction(write=True) as state:
            self._require_own(state)
            account = state.account(study_digest, run_id)
            if state.released(study_digest):
                raise ReleaseAlreadySpent(
                    "The study's noised evaluation was already charged and is not repeated.",
                    why="A study is evaluated with noise once, whatever the run; what a process "
                    "that died in it had charged stays charged.",
                    remedy="Use the first noised evaluation's figures, or propose another study.",
                )
            if account.release is None:
                raise BudgetExhausted(
                    "The run reserved nothing for a noised evaluation.",
                    remedy="Propose a study with an evaluation.release_epsilon above 0.",
                )
            self.file.append("evaluated", {"study": study_digest, "run": run_id})
        return account.frozen()

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, oldest first, after checking them as ``verify`` does."""
        return self.file.entries()

    def verify(self) -> None:
        """Check protection, chain and sums of the whole file, whatever was checked before.

        Raises:
            LedgerDamaged: naming the first entry that is wrong.
        """
        self.file.entries()

    def is_as_verified(self) -> bool:
        """Whether nobody else touched the file since it was last checked."""
        return self.file.is_as_verified()

    def head(self) -> Head:
        """Return number and hash of the last entry: what the site notes elsewhere."""
        return self.file.head()

    def hashes(self) -> tuple[str, ...]:
        """Return the hashes of all entries, oldest first."""
        return self.file.hashes()

    def has_reserved(self) -> bool:
        """Whether anything was ever reserved."""
        with self.file.transaction(write=False) as state:
            return bool(state.by_study or state.linked)

    def reservations(self) -> tuple[Reservation, ...]:
        """Return all reservations in force, oldest first."""
        with self.file.transaction(write=False) as state:
            return tuple(account.frozen() for account in state.accounts.values())

    def spent(self, study_digest: str | None = None, *, reserved: bool = False) -> Composition:
        """Return the steps started so far, of one study or of all.

        Args:
            study_digest: only this study.
            reserved: count reserved steps too, as the gates do.
        """
        with self.file.transaction(write=False) as state:
            return state.composition(reserved=reserved, study=study_digest)

    def epsilon_study(self, study_digest: str, delta: float, *, reserved: bool = False) -> float:
        """Epsilon of all runs of a study so far, by privacy-loss distribution."""
        return epsilon_of(self.spent(study_digest, reserved=reserved), delta)

    def epsilon_lifetime(self, *, reserved: bool = False) -> float:
        """Epsilon of everything so far, by the Renyi filter, at the ledger's delta and orders."""
        with self.file.transaction(write=False) as state:
            spent = state.composition(reserved=reserved)
            return lifetime_epsilon(spent, state.delta, orders=state.orders)


def _require(holds: object, what: str) -> None:
    if not holds:
        raise InternalError(f"The ledger was given an invalid {what}.")
