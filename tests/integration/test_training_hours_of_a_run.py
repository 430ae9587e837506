"""A run waits for the hours of its sites, and loses no round to them."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest

from cloister_fl.errors import TooFewSites
from cloister_fl.protocol.round_messages import RoundMessage
from cloister_fl.server.coordinator.federation import AUDIT
from cloister_fl.server.results.audit_report import account
from cloister_fl.server.rounds.events import Began, Event, Hooks, Patience, Waiting
from cloister_fl.simulation import simulated_run as simulation
from cloister_fl.simulation.run_folder import FEDERATION
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import NAMES, study, write_federation
from support.message_tap import Between, charges


def _closed() -> str:
    hour = (datetime.datetime.now().hour + 6) % 24
    return f'["{hour:02d}:00-{(hour + 1) % 24:02d}:00"]'


def _set_hours(out: Path, name: str, value: str) -> None:
    file = out / "sites" / name / "site.toml"
    file.write_text(re.sub(r"(?m)^hours = .*$", f"hours = {value}", file.read_text()))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation that waits as the coordinator's server does, only faster."""

    def hooks(**given: Any) -> Hooks:
        return Hooks(**given, patience=Patience(begin=0.1, soonest=0.01, latest=0.05))

    monkeypatch.setattr(simulation, "Hooks", hooks)


class Night:
    """Sites that close before a message, and open after they were asked a few times."""

    def __init__(self, out: Path, names: tuple[str, ...], kind: str, number: int) -> None:
        self.out, self.names, self.when = out, names, (kind, number)
        self.asked = 0
        self.closed = False

    def __call__(self, name: str, task: RoundMessage) -> RoundMessage:
        if not self.closed and (task.kind, getattr(task, "round", 0)) == self.when:
            self.closed = True
            for each in self.names:
                _set_hours(self.out, each, _closed())
        elif self.closed and task.kind == "prepare" and name == self.names[0]:
            self.asked += 1
            if self.asked == 5:
                for each in self.names:
                    _set_hours(self.out, each, "[]")
        return task


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_run_waits_in_its_middle_and_loses_no_round(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"
    night = Night(out, NAMES[:3], "train", 2)
    told: list[Event] = []
    run_simulation(Simulation(study(), sites, out), client_app=Between(night), notify=told.append)
    assert night.asked >= 5
    assert any(isinstance(one, Waiting) and one.refused["anker"] == "hours" for one in told)
    # Whoever trained before the night is not charged again after it.
    for name in NAMES:
        assert charges(out, name) == [1, 2, 3]
    (run,) = account(out / FEDERATION / AUDIT).runs
    assert (run.summed, run.lost, run.ended) == ([1, 2, 3], [], "done")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_site_that_begins_out_of_its_hours_is_of_the_run(tmp_path: Path) -> None:
    """It is invited, so the sums are over the same sites before its hours and in them."""
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"
    asked = study(aggregation="min_sites = 4")

    def change(name: str, task: RoundMessage) -> RoundMessage:
        if name == "anker":
            late = getattr(task, "round", 0) >= 2
            _set_hours(out, "anker", "[]" if late else _closed())
        return task

    told: list[Event] = []
    run_simulation(Simulation(asked, sites, out), client_app=Between(change), notify=told.append)
    (began,) = [one for one in told if isinstance(one, Began)]
    assert began.sites == NAMES
    assert began.refused == {"anker": "hours"}
    # The keys of round 2 rode with round 1, which it refused.
    assert charges(out, "anker") == [3]
    assert charges(out, "birke") == [1, 2, 3]


def test_without_patience_a_run_ends_before_its_first_round(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"

    def change(name: str, task: RoundMessage) -> RoundMessage:
        if name == "anker":
            _set_hours(out, "anker", _closed())
        return task

    with pytest.raises(
        TooFewSites, match="anker: it takes part, but is outside its training window"
    ):
        run_simulation(Simulation(study(), sites, out), client_app=Between(change))
    assert not (out / "sites" / "anker" / "ledger.sqlite").exists() or not charges(out, "anker")
