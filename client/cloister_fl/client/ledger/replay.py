"""Replay of a ledger: the state its entries add up to, and the rules that each must keep.

``replay`` reads the entries anew at every call; every rule that held when an entry was written
must hold again, so an entry that was forged with a sound chain is found where it breaks one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cloister_fl.client.ledger.chain import PROTOCOL_KINDS, Entry, damaged
from cloister_fl.encoding.framing import u64
from cloister_fl.membership.identity import Identity, verify
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose

CLOSE_LABEL = "cloister/ledger/close/v1"
ACCEPT_LABEL = "cloister/ledger/accept/v1"
"""What the signatures under ``closed`` and ``accepted`` entries are over, first."""


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
        release: of the study's release; None where it has none.
        released: whether the release was charged; it is spent.
    """

    study_digest: str
    run_id: str
    mechanism: Mechanism
    steps: int
    delta: float
    started: int
    release: Mechanism | None = None
    released: bool = False

    @property
    def left(self) -> int:
        """Steps that may still be started."""
        return self.steps - self.started

    @property
    def spent(self) -> Composition:
        """The steps started, and the release where it was charged."""
        release = ((self.release, 1),) if self.release is not None and self.released else ()
        return compose(((self.mechanism, self.started),), release)


@dataclass
class Account:
    """A reservation while the entries are read; ``steps`` are those started, once it is closed."""

    study: str
    run: str
    mechanism: Mechanism
    steps: int
    delta: float
    release: Mechanism | None = None
    rounds: dict[int, int] = field(default_factory=dict)
    released: bool = False

    @property
    def started(self) -> int:
        """Steps that were started."""
        return sum(self.rounds.values())

    def composition(self, reserved: bool) -> Composition:
        """The steps started, or reserved; and the release likewise."""
        steps = ((self.mechanism, self.steps if reserved else self.started),)
        if self.release is None or not (reserved or self.released):
            return steps
        return compose(steps, ((self.release, 1),))

    @property
    def unstarted(self) -> int:
        """Noised steps that are reserved and not started; the release is one."""
        return self.steps - self.started + (self.release is not None and not self.released)

    @property
    def idle(self) -> bool:
        """Whether nothing of it was started."""
        return not self.rounds and not self.released

    def frozen(self) -> Reservation:
        """What callers see."""
        return Reservation(
            self.study,
            self.run,
            self.mechanism,
            self.steps,
            self.delta,
            self.started,
            self.release,
            self.released,
        )


@dataclass
class State:
    """What the entries add up to."""

    orders: tuple[float, ...]
    delta: float
    accounts: dict[tuple[str, str], Account] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def of(self, study: str) -> tuple[Account, ...]:
        """All accounts of a study."""
        return tuple(account for account in self.accounts.values() if account.study == study)

    def unstarted(self, study: str) -> int:
        """Steps of a study that were reserved and never started; a release is one."""
        return sum(account.unstarted for account in self.of(study))

    def released(self, study: str) -> bool:
        """Whether a run of the study charged its release."""
        return any(account.released for account in self.of(study))

    def composition(self, *, reserved: bool, study: str | None = None) -> Composition:
        """The steps started, or reserved, of one study or of all."""
        return compose(
            *(
                account.composition(reserved)
                for account in self.accounts.values()
                if study is None or account.study == study
            )
        )


def replay(entries: Iterable[Entry]) -> State:
    """Add the entries up; every rule that held when they were written must hold again."""
    state: State | None = None
    for entry in entries:
        try:
            state = _apply(state, entry)
        except (KeyError, TypeError, ValueError):
            raise damaged(f"entry {entry.seq} breaks a rule of the ledger") from None
    if state is None:
        raise damaged("entry 1 is missing")
    return state


def _apply(state: State | None, entry: Entry) -> State:
    body = entry.body
    if state is None:
        orders = tuple(float(order) for order in body["orders"])
        _hold(entry.kind == "created" and body["version"] == 1)
        _hold(0 < body["delta"] < 1 and orders and all(1 < o < math.inf for o in orders))
        return State(orders, float(body["delta"]))
    if entry.kind in PROTOCOL_KINDS:
        return state
    if entry.kind == "closed":
        _close(state, entry)
        return state
    if entry.kind == "accepted":
        _accept(entry)
        return state
    _hold(body["study"] not in state.closed)
    key = (str(body["study"]), str(body["run"]))
    if entry.kind == "reserved":
        mechanism = Mechanism(float(body["noise_multiplier"]), float(body["sampling_rate"]))
        _hold(key not in state.accounts and body["steps"] >= 1)
        given = body["release_noise_multiplier"]
        release = None if given is None else Mechanism(float(given), 1.0)
        state.accounts[key] = Account(
            *key, mechanism, int(body["steps"]), float(body["delta"]), release
        )
    elif entry.kind == "adopted":
        account = state.accounts.pop((key[0], str(body["from"])))
        _hold(key not in state.accounts and account.idle)
        account.run = key[1]
        state.accounts[key] = account
    elif entry.kind == "started":
        account = state.accounts[key]
        _hold(body["round"] not in account.rounds and body["steps"] >= 1)
        account.rounds[int(body["round"])] = int(body["steps"])
        _hold(account.started <= account.steps)
    elif entry.kind == "evaluated":
        account = state.accounts[key]
        _hold(account.release is not None and not state.released(key[0]))
        account.released = True
    else:
        raise ValueError(entry.kind)
    return state


def close_body(study: str, released: int, previous: str, steward: Identity) -> dict[str, Any]:
    """The entry that closes a study, signed for this place in this chain.

    Args:
        study: the study's hash.
        released: steps that were reserved and never started.
        previous: hash of the ledger's last entry.
        steward: signs it: the site's identity, which the steward's command can read.
    """
    signature = steward.sign(CLOSE_LABEL, study.encode(), u64(released), previous.encode())
    return {
        "study": study,
        "released": released,
        "key": steward.public.hex(),
        "signature": signature.hex(),
    }


def _close(state: State, entry: Entry) -> None:
    body = entry.body
    study, released = str(body["study"]), int(body["released"])
    fields = (study.encode(), u64(released), entry.previous.encode())
    key, signature = bytes.fromhex(body["key"]), bytes.fromhex(body["signature"])
    _hold(verify(key, signature, CLOSE_LABEL, *fields))
    _hold(study not in state.closed and state.of(study))
    _hold(released == state.unstarted(study))
    for account in state.of(study):
        account.steps = account.started
        account.release = account.release if account.released else None
    state.closed.add(study)


def accept_body(missed: int, previous: str, steward: Identity) -> dict[str, Any]:
    """The entry by which the steward takes a ledger for the newest; signed for this place.

    Args:
        missed: number of the newest entry that was noted elsewhere, 0 for none.
        previous: hash of the ledger's last entry.
        steward: signs it, see ``close_body``.
    """
    signature = steward.sign(ACCEPT_LABEL, u64(missed), previous.encode())
    return {"missed": missed, "key": steward.public.hex(), "signature": signature.hex()}


def _accept(entry: Entry) -> None:
    body = entry.body
    key, signature = bytes.fromhex(body["key"]), bytes.fromhex(body["signature"])
    missed = int(body["missed"])
    _hold(missed >= 0)
    _hold(verify(key, signature, ACCEPT_LABEL, u64(missed), entry.previous.encode()))


def _hold(rule: object) -> None:
    if not rule:
        raise ValueError("a rule of the ledger does not hold")
