"""What the site remembers of secure aggregation, in the ledger's own chain.

Three facts, none of them secret: which key epochs were begun, whom a round invited, and for which
sites it was answered. They stand in the ledger's file so that whoever restores an old copy of it
to make the site answer twice rolls the privacy account back with it, which the head of the chain,
noted elsewhere, gives away.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloister_client.ledger import Ledger
from cloister_client.ledger_schema import Entry, append, read, transaction


class RoundMemory:
    """A ``secagg.RoundStore`` on disk; every method is one durable transaction.

    Args:
        path: the ledger's file; made if it is not there.
        delta: of the ledger, see ``Ledger.open``.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.open``. The methods raise ``LedgerDamaged``.
    """

    def __init__(self, path: Path, *, delta: float) -> None:
        Ledger.open(path, delta=delta)
        self._path = path

    def claim_epoch(self, kid: bytes) -> bool:
        """Record a key epoch's id; whether it was new."""
        return self._first("epoch", {"epoch": kid.hex()}, {}) is None

    def open_round(
        self, study: bytes, round_number: int, invited: tuple[str, ...], threshold: int
    ) -> tuple[tuple[str, ...], int]:
        """Record whom a round invites, and t; what stands since the first time."""
        terms: dict[str, Any] = {"invited": list(invited), "threshold": threshold}
        held = self._first("round", _key(study, round_number), terms) or terms
        return tuple(held["invited"]), int(held["threshold"])

    def committed(self, study: bytes, round_number: int) -> tuple[str, ...] | None:
        """The sites that a round was answered for, or None."""
        with transaction(self._path, write=False) as connection:
            held = _find(read(connection), "answered", _key(study, round_number))
        return None if held is None else tuple(held["survivors"])

    def commit(self, study: bytes, round_number: int, u3: tuple[str, ...]) -> tuple[str, ...]:
        """Record the sites that a round is answered for; what stands since the first time."""
        answer = {"survivors": list(u3)}
        held = self._first("answered", _key(study, round_number), answer) or answer
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


def _key(study: bytes, round_number: int) -> dict[str, Any]:
    return {"study": study.hex(), "sum": round_number}


def _find(entries: Iterable[Entry], kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    for entry in entries:
        if entry.kind == kind and all(entry.body.get(name) == key[name] for name in key):
            return dict(entry.body)
    return None
