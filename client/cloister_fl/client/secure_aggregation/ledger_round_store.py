"""Store of key epochs and rounds of secure aggregation, in the ledger's own chain.

Three facts, none of them secret: which key epochs were begun, whom a round invited, and for which
sites it was answered. They stand in the ledger's file so that whoever restores an old copy of it
to make the site answer twice rolls the privacy account back with it, which the head of the chain,
noted elsewhere, gives away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.errors import ParameterRefused


class RoundMemory:
    """A ``secagg.RoundStore`` on disk; every method is one durable transaction.

    Args:
        ledger: gives the open ledger, which a session may have opened anew meanwhile.
        subject: 32 bytes over all that determines an update, in place of the study's hash. With
            privacy on that is the study, for each study draws its own noise and is charged for
            it; without, studies that differ in name alone give the same updates, and two sums of
            these over other sites would tell of single hospitals.
        most_epochs: key epochs that one subject may begin, so that no server fills the ledger.

    The methods raise LedgerDamaged and LedgerRolledBack, see ``Ledger``.
    """

    def __init__(self, ledger: Callable[[], Ledger], *, subject: bytes, most_epochs: int) -> None:
        self._ledger = ledger
        self._subject = subject.hex()
        self._most_epochs = most_epochs

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch's id; whether it was new.

        Raises:
            ParameterRefused: the subject has begun too many.
        """
        with self._ledger().chain.transaction(write=True) as state:
            if kid.hex() in state.epochs:
                return False
            begun = state.begun[self._subject]
            if begun >= self._most_epochs:
                raise ParameterRefused(
                    f"The study has started {begun} key epochs here, more than it can need.",
                    why="The coordinator is faulty, or the study was run very often.",
                    remedy="Ask the coordinator, and propose a new study.",
                )
            self._ledger().chain.append("epoch", {"epoch": kid.hex(), "study": self._subject})
            return True

    def open_round(self, study: bytes, round_number: int, constants: bytes) -> bytes:
        """Record a round's constants; what stands since the first time."""
        del study
        key = (self._subject, round_number)
        with self._ledger().chain.transaction(write=True) as state:
            if key not in state.constants:
                self._append("round", round_number, {"constants": constants.hex()})
            return bytes.fromhex(state.constants[key])

    def committed(self, study: bytes, round_number: int) -> tuple[str, ...] | None:
        """The sites that a round was answered for, or None."""
        del study
        with self._ledger().chain.transaction(write=False) as state:
            return state.answered.get((self._subject, round_number))

    def commit(self, study: bytes, round_number: int, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the sites that a round is answered for; what stands since the first time."""
        del study
        key = (self._subject, round_number)
        with self._ledger().chain.transaction(write=True) as state:
            if key not in state.answered:
                self._append("answered", round_number, {"survivors": list(u3)})
            return state.answered[key]

    def _append(self, kind: str, number: int, fact: dict[str, Any]) -> None:
        self._ledger().chain.append(kind, {"study": self._subject, "sum": number, **fact})
