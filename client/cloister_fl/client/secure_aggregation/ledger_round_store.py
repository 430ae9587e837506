"""Store of key epochs and rounds of secure aggregation, in the ledger's own chain.

Three facts, none of them secret: which key epochs were begun, whom a round invited, and for which
sites it was answered. They stand in the ledger's file so that whoever restores an old copy of it
to make the site answer twice rolls the privacy account back with it, which the head of the chain,
noted elsewhere, gives away.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloister_fl.client.ledger.chain import Entry, append, read, transaction
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.errors import ParameterRefused


class RoundMemory:
    """A ``secagg.RoundStore`` on disk; every method is one durable transaction.

    Args:
        path: the ledger's file; made if it is not there.
        delta: of the ledger, see ``Ledger.open``.
        subject: 32 bytes over all that determines an update, in place of the study's hash. With
            privacy on that is the study, for each study draws its own noise and is charged for
            it; without, studies that differ in name alone give the same updates, and two sums of
            these over other sites would tell of single hospitals.
        most_epochs: key epochs that one subject may begin, so that no server fills the ledger.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.open``. The methods raise ``LedgerDamaged``.
    """

    def __init__(self, path: Path, *, delta: float, subject: bytes, most_epochs: int) -> None:
        Ledger.open(path, delta=delta)
        self._path = path
        self._subject = subject.hex()
        self._most_epochs = most_epochs

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch's id; whether it was new.

        Raises:
            ParameterRefused: the subject has begun too many.
        """
        with transaction(self._path, write=True) as connection:
            entries = read(connection)
            if _find(entries, "epoch", {"epoch": kid.hex()}) is not None:
                return False
            begun = sum(
                entry.kind == "epoch" and entry.body["study"] == self._subject for entry in entries
            )
            if begun >= self._most_epochs:
                raise ParameterRefused(
                    f"The study has started {begun} key epochs here, more than it can need.",
                    why="The coordinator is faulty, or the study was run very often.",
                    remedy="Ask the coordinator, and propose a new study.",
                )
            append(connection, "epoch", {"epoch": kid.hex(), "study": self._subject})
            return True

    def open_round(self, study: bytes, round_number: int, constants: bytes) -> bytes:
        """Record a round's constants; what stands since the first time."""
        del study
        held = self._first("round", self._key(round_number), {"constants": constants.hex()})
        return constants if held is None else bytes.fromhex(held["constants"])

    def committed(self, study: bytes, round_number: int) -> tuple[str, ...] | None:
        """The sites that a round was answered for, or None."""
        del study
        with transaction(self._path, write=False) as connection:
            held = _find(read(connection), "answered", self._key(round_number))
        return None if held is None else tuple(held["survivors"])

    def commit(self, study: bytes, round_number: int, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the sites that a round is answered for; what stands since the first time."""
        del study
        answer = {"survivors": list(u3)}
        held = self._first("answered", self._key(round_number), answer) or answer
        return tuple(held["survivors"])

    def _first(
        self, kind: str, key: dict[str, Any], value: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Write ``value`` under ``key`` where nothing stands there yet, else return what does."""
        with transaction(self._path, write=True) as connection:
            held = _find(read(connection), kind, key)
            if held is None:
                append(connection, kind, {**key, **value})
            return held

    def _key(self, round_number: int) -> dict[str, Any]:
        return {"study": self._subject, "sum": round_number}


def _find(entries: Iterable[Entry], kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    for entry in entries:
        if entry.kind == kind and all(entry.body.get(name) == key[name] for name in key):
            return dict(entry.body)
    return None
