"""Replay of a ledger: the state its entries add up to, and the rules that each must keep.

``apply`` adds one entry. It is the only place where the state changes, so the state that follows
each entry as it is written is the one that a replay of all of them gives; and every rule that held
when an entry was written must hold again, so an entry that was forged with a sound chain is found
where it breaks one.

Totals are kept as whole numbers of steps by mechanism; no figure is added up in floating point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloister_fl.client.ledger.chain import PROTOCOL_KINDS, Entry
from cloister_fl.client.ledger.steward_entries import Acceptance, acceptance_of, closer_of
from cloister_fl.encoding.canonical_json import HASH
from cloister_fl.errors import BudgetExhausted
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose


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
        rounds: how many rounds were started.
        given_up: what was reserved, never started, and released by a closing.
        releases_unstarted: whether the site's policy said, when it was reserved, that the end of
            the run releases what was not started.
    """

    study_digest: str
    run_id: str
    mechanism: Mechanism
    steps: int
    delta: float
    started: int
    release: Mechanism | None = None
    released: bool = False
    rounds: int = 0
    given_up: Composition = ()
    releases_unstarted: bool = False

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
    """A reservation while entries are added; ``steps`` are those started, once it is closed."""

    study: str
    run: str
    mechanism: Mechanism
    steps: int
    delta: float
    release: Mechanism | None = None
    started: int = 0
    rounds: set[int] = field(default_factory=set)
    released: bool = False
    given_up: Composition = ()
    releases_unstarted: bool = False

    @property
    def reserved(self) -> Composition:
        """All that it may come to cost: the steps, and the release."""
        release = ((self.release, 1),) if self.release is not None else ()
        return compose(((self.mechanism, self.steps),), release)

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
            len(self.rounds),
            self.given_up,
            self.releases_unstarted,
        )


class Total:
    """Noised steps by mechanism, of each study and of all."""

    def __init__(self) -> None:
        self._all: Counter[Mechanism] = Counter()
        self._by_study: dict[str, Counter[Mechanism]] = {}

    def add(self, study: str, mechanism: Mechanism, steps: int) -> None:
        """Count steps of a study; a negative number takes them off."""
        self._all[mechanism] += steps
        self._by_study.setdefault(study, Counter())[mechanism] += steps

    def studies(self) -> tuple[str, ...]:
        """The studies that anything was counted of."""
        return tuple(self._by_study)

    def of(self, study: str | None, *, less: Composition = ()) -> Composition:
        """The steps of one study, or of all; without those of ``less``, which are among them."""
        counted = self._all if study is None else self._by_study.get(study, Counter())
        left = counted.copy()
        for mechanism, steps in less:
            left[mechanism] -= steps
        return compose(tuple(left.items()))


Sum = tuple[str, int]
"""A sum of secure aggregation: what determines its updates, and its number; or, of vectors without
noise, the hash of its model, and 0 for updates or 1 for counts."""


@dataclass
class State:
    """What the entries add up to.

    Attributes:
        orders, delta: of the lifetime's filter.
        accounts: by study and run, oldest first.
        by_study: the same, of each study.
        closed: studies that the steward closed.
        spent: what was started.
        reserved: what may come to be, the started included.
        epochs: key epochs of secure aggregation that were begun.
        begun: how many of them each subject began.
        constants: of each sum, whom it invited and under which terms, as a hash.
        answered: of each sum, the sites that it was answered for.
        linked: ledgers of the same patients whose spending counts here, by id.
        continued: id of the ledger that counts this one's spending from now on; empty for none.
        signers: by number of each entry that a steward signed, the public key that it names.
        acceptances: by number of its entry, oldest first.
    """

    orders: tuple[float, ...]
    delta: float
    accounts: dict[tuple[str, str], Account] = field(default_factory=dict)
    by_study: dict[str, list[Account]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    spent: Total = field(default_factory=Total)
    reserved: Total = field(default_factory=Total)
    epochs: set[str] = field(default_factory=set)
    begun: Counter[str] = field(default_factory=Counter)
    constants: dict[Sum, str] = field(default_factory=dict)
    answered: dict[Sum, tuple[str, ...]] = field(default_factory=dict)
    linked: set[str] = field(default_factory=set)
    continued: str = ""

    signers: dict[int, bytes] = field(default_factory=dict)
    acceptances: dict[int, Acceptance] = field(default_factory=dict)

    def require_here(self) -> None:
        """Refuse a new reservation where another ledger counts these patients by now.

        Raises:
            BudgetExhausted: it does.
        """
        if self.continued:
            raise BudgetExhausted(
                "This ledger is continued in another site folder.",
                why="The steward linked it there; what was reserved here before counts there, and "
                "nothing more can be reserved here.",
                remedy="Train from that folder: budget there shows this ledger's spending.",
            )

    def accepted(self, signer: bytes | None) -> tuple[Acceptance, ...]:
        """The acceptances that a key signed, oldest first; of any key for None."""
        every = self.acceptances.values()
        return tuple(one for one in every if signer in {None, one.key})

    def foreign(self, signer: bytes | None) -> tuple[int, ...]:
        """Entries that another key signed, and that no later acceptance by ``signer`` covers.

        The signature of an entry says that whoever has the key that it names wrote it, and anybody
        has one. A ledger that moved to a new folder, with a new key, has entries of the old one:
        the acceptance there is over all that stands before it.
        """
        if signer is None or not self.signers:
            return ()
        own = [number for number, one in self.acceptances.items() if one.key == signer]
        covered = max(own, default=0)
        return tuple(n for n, key in self.signers.items() if key != signer and n > covered)

    def require_open(self, study: str) -> None:
        """Refuse a study that the steward closed.

        Raises:
            BudgetExhausted: it is closed.
        """
        if study in self.closed:
            raise BudgetExhausted(
                "The study is closed at this site.",
                why="The steward closed it; the steps that it had not started are no longer "
                "reserved.",
                remedy="Propose another study; a closed one cannot be opened again.",
            )

    def account(self, study: str, run: str) -> Account:
        """The reservation of a run in force.

        Raises:
            BudgetExhausted: it has none, or the study is closed.
        """
        self.require_open(study)
        account = self.accounts.get((study, run))
        if account is None:
            raise BudgetExhausted(
                "The run has no reservation in the privacy ledger.",
                remedy="Approve the study, and start a new run; a run that another one replaced "
                "cannot continue.",
            )
        return account

    def of(self, study: str) -> tuple[Account, ...]:
        """All accounts of a study, oldest first."""
        return tuple(self.by_study.get(study, ()))

    def unstarted(self, study: str) -> int:
        """Steps of a study that were reserved and never started; a release is one."""
        return sum(account.unstarted for account in self.of(study))

    def released(self, study: str) -> bool:
        """Whether a run of the study charged its release."""
        return any(account.released for account in self.of(study))

    def composition(self, *, reserved: bool, study: str | None = None) -> Composition:
        """The steps started, or reserved, of one study or of all."""
        return (self.reserved if reserved else self.spent).of(study)


def apply(state: State | None, entry: Entry) -> State:
    """Add an entry to the state, which is changed in place; None before the first entry.

    Raises:
        KeyError, TypeError, ValueError: the entry breaks a rule of the ledger; the state is of no
            use any more.
    """
    body = entry.body
    if state is None:
        orders = tuple(float(order) for order in body["orders"])
        _hold(entry.kind == "created" and body["version"] == 1)
        _hold(0 < body["delta"] < 1 and orders and all(1 < o < math.inf for o in orders))
        return State(orders, float(body["delta"]))
    if entry.kind in PROTOCOL_KINDS:
        _remember(state, entry)
    elif entry.kind == "closed":
        _close(state, entry)
    elif entry.kind == "accepted":
        _accept(state, entry)
    elif entry.kind == "linked":
        _link(state, entry)
    elif entry.kind == "continued":
        _hold(not state.continued and HASH.fullmatch(body["ledger"]))
        state.continued = str(body["ledger"])
    else:
        _hold(body["study"] not in state.closed)
        _count(state, entry, (str(body["study"]), str(body["run"])))
    return state


def _count(state: State, entry: Entry, key: tuple[str, str]) -> None:
    """Add an entry on a run of a study that is open."""
    body, study = entry.body, key[0]
    if entry.kind == "reserved":
        _hold(not state.continued)
        mechanism = Mechanism(float(body["noise_multiplier"]), float(body["sampling_rate"]))
        _hold(key not in state.accounts and body["steps"] >= 1)
        given = body["release_noise_multiplier"]
        release = None if given is None else Mechanism(float(given), 1.0)
        made = Account(*key, mechanism, int(body["steps"]), float(body["delta"]), release)
        made.releases_unstarted = body["release_unstarted"] is True
        state.accounts[key] = made
        state.by_study.setdefault(study, []).append(made)
        for each, steps in made.reserved:
            state.reserved.add(study, each, steps)
    elif entry.kind == "adopted":
        account = state.accounts.pop((study, str(body["from"])))
        _hold(key not in state.accounts and account.idle)
        account.run = key[1]
        state.accounts[key] = account
    elif entry.kind == "started":
        account = state.accounts[key]
        number, steps = int(body["round"]), int(body["steps"])
        _hold(number not in account.rounds and body["steps"] >= 1)
        account.rounds.add(number)
        account.started += steps
        _hold(account.started <= account.steps)
        state.spent.add(study, account.mechanism, steps)
    elif entry.kind == "evaluated":
        account = state.accounts[key]
        _hold(account.release is not None and not state.released(study))
        account.released = True
        assert account.release is not None
        state.spent.add(study, account.release, 1)
    else:
        raise ValueError(entry.kind)


def _remember(state: State, entry: Entry) -> None:
    """Add an entry of secure aggregation; of each fact, the first stands and there is no second."""
    body = entry.body
    subject = str(body["study"])
    if entry.kind == "epoch":
        epoch = str(body["epoch"])
        _hold(epoch not in state.epochs)
        state.epochs.add(epoch)
        state.begun[subject] += 1
        return
    key = (subject, int(body["sum"]))
    if entry.kind == "round":
        _hold(key not in state.constants)
        state.constants[key] = str(body["constants"])
    else:
        _hold(key not in state.answered)
        state.answered[key] = tuple(map(str, body["survivors"]))


def _close(state: State, entry: Entry) -> None:
    body = entry.body
    study, released = str(body["study"]), int(body["released"])
    key = closer_of(body, entry.previous)
    _hold(study not in state.closed and state.of(study))
    _hold(released == state.unstarted(study))
    for account in state.of(study):
        given_up: Composition = ((account.mechanism, account.steps - account.started),)
        account.steps = account.started
        if account.release is not None and not account.released:
            given_up = (*given_up, (account.release, 1))
            account.release = None
        account.given_up = compose(given_up)
        for mechanism, steps in account.given_up:
            state.reserved.add(study, mechanism, -steps)
    state.closed.add(study)
    state.signers[entry.seq] = key


def link_body(other: str, spending: Mapping[str, Composition]) -> dict[str, Any]:
    """The entry that counts another ledger's spending on the same patients.

    Args:
        other: id of that ledger, the hash of its first entry.
        spending: all that it may come to spend, by study.
    """
    steps = [
        {
            "study": study,
            "noise_multiplier": mechanism.noise_multiplier,
            "sampling_rate": mechanism.sampling_rate,
            "steps": count,
        }
        for study, composition in sorted(spending.items())
        for mechanism, count in composition
    ]
    return {"ledger": other, "steps": steps}


def _link(state: State, entry: Entry) -> None:
    other = str(entry.body["ledger"])
    _hold(HASH.fullmatch(other) and other not in state.linked)
    state.linked.add(other)
    for row in entry.body["steps"]:
        mechanism = Mechanism(float(row["noise_multiplier"]), float(row["sampling_rate"]))
        _hold(row["steps"] >= 1)
        # As spent: what of it was only reserved is for the other ledger to start.
        for total in (state.spent, state.reserved):
            total.add(str(row["study"]), mechanism, int(row["steps"]))


def _accept(state: State, entry: Entry) -> None:
    acceptance = acceptance_of(entry.body, entry.previous)
    state.signers[entry.seq] = acceptance.key
    state.acceptances[entry.seq] = acceptance


def _hold(rule: object) -> None:
    if not rule:
        raise ValueError("a rule of the ledger does not hold")
