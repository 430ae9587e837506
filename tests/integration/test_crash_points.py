"""A round that ends at any point of itself, by an abort or by SIGKILL: nothing is carried over.

The points are found by watching one sound round: the first call of each function of Cloister's own
packages, each call in the modules that charge and train, and each call that makes something durable
(a flush to disk, a rename, a statement of SQLite). At each the round is ended, and afterwards

- every step that drew noise, and every look at a patient, stands in the ledger as spent;
- the ledger, its notes and the log are sound, and no rollback is cried;
- the round is trained if and only if it was not charged, and the next round is the one that a site
  gives which never crashed, to the bit.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from sqlite3 import Connection
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

import cloister_fl
import cloister_fl.client
from cloister_fl.client import app as client
from cloister_fl.client.admission import gate
from cloister_fl.client.ledger import ledger, ledger_file, site_session
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of, log_of, path_of
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.client.training import csprng, dp_optimizer, local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.networks import registry
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.protocol.round_messages import (
    Exchange,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    octets,
)
from cloister_fl.protocol.round_messages import Update as Sent
from cloister_fl.study.schema import Study
from support.federations import study
from support.hand_asked_site import ask, fits, rounds_charged, write_hospital
from support.spending import disagreements

STUDY = study(aggregation="secure = false", training='momentum = 0.9\noptimizer = "sgd"')
PACKAGES = tuple(cloister_fl.__path__)
CHARGING = (gate, ledger, ledger_file, site_session)
WHOLLY = tuple(module.__file__ for module in (*CHARGING, local_training, dp_optimizer))
DURABLE = (os.fsync, os.replace, os.rename, os.link)


FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Ended(BaseException):
    """What ends a round in the process that goes on."""


class Points:
    """The product's ClientApp, which ends at one point of a message; or counts them."""

    def __init__(self, end_at: int | None = None, *, kill: bool = False) -> None:
        self.names: list[str] = []
        self._end_at = end_at
        self._kill = kill
        self._known: set[CodeType] = set()

    def __call__(self, message: Message, context: Context) -> Message:
        sys.setprofile(self._profile)
        try:
            return client.app(message, context)
        finally:
            sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if not code.co_filename.startswith(PACKAGES):
                return
            if code not in self._known or code.co_filename in WHOLLY:
                self._known.add(code)
                self._reached(code.co_qualname)
        elif event == "c_call" and (
            argument in DURABLE or isinstance(getattr(argument, "__self__", None), Connection)
        ):
            self._reached(argument.__name__)

    def _reached(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 != self._end_at:
            return
        if self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(None)
        raise Ended


def train(number: int, asked: Study = STUDY) -> TrainTask:
    module = registry.build(asked.network, 2, 1, size=asked.input.size, seed=asked.training.seed)
    return TrainTask(asked.canonical(), "run", number, 5, octets(), flatten(module))


class Place:
    """A hospital that let the study in, and what a round does there.

    ``warm``: in a process that has answered for it before, and so has verified its files.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, warm: bool) -> None:
        self.root = root
        self.warm = warm
        self.witness = root / "witness"
        site = write_hospital(root / "sound", fits(STUDY))
        assert isinstance(ask(site, Prepare(STUDY.canonical(), "run", 5, "", b"", "")), Prepared)
        monkeypatch.setattr(csprng, "_fresh_key", lambda: bytes(32))
        self._watch(monkeypatch)
        self.copies = 0
        self.points = Points()
        # Once before, so that what a process works out once is not among the points.
        ask(self.copy(), train(1))
        sound = self.copy()
        assert isinstance(self.ask(sound, self.points), Sent)
        self.second = self.update(ask(sound, train(2)))

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave a mark, which outlives a kill, at each draw of patients and each draw of noise."""
        honest_normal, honest_draw = SecureRandom.normal, local_training.draw_bags

        def mark(what: bytes) -> None:
            with self.witness.open("ab") as file:
                file.write(what)

        def normal(*given: Any, **named: Any) -> Any:
            mark(b"n")
            return honest_normal(*given, **named)

        def draw(*given: Any, **named: Any) -> Any:
            mark(b"d")
            return honest_draw(*given, **named)

        monkeypatch.setattr(SecureRandom, "normal", normal)
        monkeypatch.setattr(local_training, "draw_bags", draw)

    def copy(self) -> Site:
        """The hospital as it was before the round, in a folder of its own."""
        client.app.kept._cohorts.clear()
        self.witness.write_bytes(b"")
        folder = self.root / f"copy{self.copies}"
        self.copies += 1
        shutil.copytree(self.root / "sound" / "anker", folder / "anker")
        return open_site(folder / "anker")

    def ask(self, site: Site, client_app: Callable[[Message, Context], Message]) -> RoundMessage:
        """Ask a hospital for round 1, after another message where it is to be warm."""
        if self.warm:
            nothing = ask(site, Exchange(STUDY.canonical(), "run", 1, 5, octets()))
            assert isinstance(nothing, Refusal)
            assert nothing.reason == "message"
        return ask(site, train(1), client_app)

    @staticmethod
    def update(reply: RoundMessage) -> np.ndarray:
        assert isinstance(reply, Sent), reply
        return reply.vector

    def holds(self, site: Site, point: str) -> bool:
        """Whether the site is as it must be after the end of round 1 at ``point``; its charge."""
        marks = self.witness.read_bytes()
        charged = rounds_charged(site)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        (held,) = ledger.reservations()
        assert charged in ([], [1]), point
        assert held.started == len(charged) * STUDY.training.steps_per_round, point
        assert held.steps == STUDY.training.total_steps, point
        # Undercharged would be: a step that drew patients or noise, and is not in the ledger.
        assert max(marks.count(b"n"), marks.count(b"d")) <= held.started, point
        assert disagreements(site) == (), point
        again = ask(site, train(1))
        if charged:
            assert isinstance(again, Refusal), point
            assert again.reason == "round-spent", point
        else:
            assert isinstance(again, Sent), point
        second = self.update(ask(site, train(2)))
        assert np.array_equal(second, self.second), point
        assert rounds_charged(site) == [1, 2], point
        assert disagreements(site) == (), point
        assert entries_of(site), point
        shutil.rmtree(site.root.parent)
        return bool(charged)


@pytest.fixture(params=["warm", pytest.param("cold", marks=pytest.mark.slow)])
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Place]:
    client.app.kept._cohorts.clear()
    yield Place(tmp_path, monkeypatch, warm=request.param == "warm")
    client.app.kept._cohorts.clear()


def abort(place: Place, at: int) -> bool:
    site = place.copy()
    with pytest.raises(Ended):
        place.ask(site, Points(at))
    return place.holds(site, f"abort at {at}, {place.points.names[at]}")


def kill(place: Place, at: int) -> bool:
    site = place.copy()
    pid = os.fork()
    if pid == 0:
        try:
            place.ask(site, Points(at, kill=True))
        finally:
            os._exit(7)  # Not reached: it is killed before.
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return place.holds(site, f"kill at {at}, {place.points.names[at]}")


def few(place: Place) -> list[int]:
    """Every sixth point from the charge to the look at the data, and some of all others."""
    names = place.points.names
    around = range(names.index("charge"), names.index("Kept.cohort") + 1)
    return sorted({*around[::6], around[-1], *range(0, len(names), 60), len(names) - 1})


def test_the_points_are_those_of_a_round(place: Place) -> None:
    names = place.points.names
    order = ["respond", "admit", "charge", "Ledger.start_round", "SiteSession.note", "fsync"]
    order += [
        "load_for_run",
        "draw_bags",
        "SecureRandom.normal",
        "PatientDPOptimizer.zero_grad",
        "_logged",
    ]
    places, start = [], 0
    for name in order:
        start = names.index(name, start)
        places.append(start)
    assert len(names) > 200
    assert names.count("PatientDPOptimizer._finish") == STUDY.training.steps_per_round
    assert places[3] < names.index("execute", places[3]) < places[4]
    # Only what was not verified before is read whole.
    assert (
        ("AuditLog._read_whole" in names) == ("SiteSession._compare" in names) == (not place.warm)
    )


def _are_charged_in_time(place: Place, charged: dict[int, bool]) -> None:
    """Nothing is charged before the charge, and all is once the data are looked at.

    Between the two the points of two rounds need not be the same calls: what waits for a lock or a
    disk calls more often where the machine is busy.
    """
    names = place.points.names
    begun, looked = names.index("charge"), names.index("Kept.cohort")
    assert not any(is_charged for at, is_charged in charged.items() if at < begun)
    assert all(is_charged for at, is_charged in charged.items() if at >= looked)


@pytest.mark.parametrize(
    "end", [pytest.param(abort, marks=pytest.mark.slow), pytest.param(kill, marks=FORKS)]
)
def test_a_round_that_ends_anywhere_is_charged_before_it_is_trained(
    place: Place, end: Callable[[Place, int], bool]
) -> None:
    _are_charged_in_time(place, {at: end(place, at) for at in few(place)})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("end", [abort, pytest.param(kill, marks=FORKS)])
def test_a_round_that_ends_at_every_point(place: Place, end: Callable[[Place, int], bool]) -> None:
    _are_charged_in_time(place, {at: end(place, at) for at in range(len(place.points.names))})


# A disk that is full.


def on_a_disk_that_takes(most: int) -> Callable[[Message, Context], Message]:
    """The product's ClientApp while no file can grow beyond ``most`` bytes."""

    def served(message: Message, context: Context) -> Message:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            return client.app(message, context)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return served


@pytest.mark.slow
def test_a_full_disk_refuses_before_the_data_or_charges(place: Place) -> None:
    # A log longer than the ledger, so that there is room for the charge and not for its note.
    sound = open_site(place.root / "sound" / "anker")
    while path_of(sound).stat().st_size < 2 * sound.ledger.stat().st_size:
        log_of(sound).append("asked", message="", why="x" * 3000)
    end = path_of(sound).stat().st_size
    met = set()
    for most in [0, 600, *range(end, end + 2400, 150), 2 * end]:
        site = place.copy()
        reply = place.ask(site, on_a_disk_that_takes(most))
        looked = bool(place.witness.read_bytes())
        charged = bool(rounds_charged(site))
        if isinstance(reply, Refusal):
            assert reply.reason == "declined", most
        assert charged or not looked, most
        assert charged or isinstance(reply, Refusal), most
        assert place.holds(site, f"{most} bytes") == charged
        met.add((type(reply), charged, looked))
    assert {(Refusal, False, False), (Refusal, True, False), (Sent, True, True)} <= met
