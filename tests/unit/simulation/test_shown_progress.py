"""Progress of a simulation: to a callback, in a notebook, on a terminal, or to nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cloister_fl.metrics import Estimate, Metrics
from cloister_fl.server.rounds.checkpoint import Figures, Released
from cloister_fl.server.rounds.events import Began, Lost, Measured, ReleaseMade
from cloister_fl.simulation import shown_progress
from cloister_fl.simulation.shown_progress import Progress, RaisesLater, shown

METRICS = Metrics({"auroc": Estimate(0.9, 0.8, 1.0)}, 20, (12, 8))
EVENTS = (
    Began(sites=("anker", "birke"), refused={}, rounds=3, lost=()),
    Measured(Figures(round=0, sites=0, seconds=0.0, update_norm=0.0), rounds=3),
    Measured(Figures(1, 2, 1.0, 0.5, 0.8, METRICS), rounds=3),
    Lost(2),
    Measured(Figures(3, 2, 1.0, 0.5, 1.2), rounds=3),
    ReleaseMade(Released(asked=("anker",))),
)


def play(progress: bool | Callable[[Progress], object] | None) -> None:
    """Draw two patients, then train three rounds of which one is lost."""
    with shown(progress) as display:
        display.count("Drawing patients", 1, 2)
        display.count("Drawing patients", 2, 2)
        for event in EVENTS:
            display(event)


def test_a_callback_is_told_of_each_part() -> None:
    told: list[Progress] = []
    play(told.append)
    assert [(each.step, each.done, each.total) for each in told] == [
        ("Drawing patients", 1, 2),
        ("Drawing patients", 2, 2),
        ("Training rounds", 0, 3),
        ("Training rounds", 1, 3),
        ("Training rounds", 2, 3),
        ("Training rounds", 3, 3),
    ]
    first = told[3].round
    assert first is not None
    assert (first.number, first.metrics, first.epsilon) == (1, METRICS, 0.8)
    assert [each.round is None for each in told] == [True, True, False, False, True, False]
    assert (
        str(told[3])
        == "Training rounds: 1 of 3 (round 1: AUROC 0.900 (0.800 to 1.000), epsilon 0.80)"
    )
    assert str(told[4]) == "Training rounds: 2 of 3"


@pytest.mark.parametrize("progress", [False, None])
def test_nothing_is_printed_where_nobody_looks_or_wants_it(
    progress: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    play(progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt()])
def test_what_a_callback_raises_comes_when_the_round_is_saved(error: BaseException) -> None:
    told: list[Progress] = []

    def act(progress: Progress) -> None:
        told.append(progress)
        if progress.done == 1:
            raise error

    with shown(act) as display:
        later = RaisesLater(display)
        for event in EVENTS[:2]:
            later(event)
        later.check()
        for event in EVENTS[2:]:
            later(event)
        with pytest.raises(type(error)) as caught:
            later.check()
    assert caught.value is error
    # Nothing more is told to a callback that has failed.
    assert [each.done for each in told] == [0, 1]


def test_who_asks_for_a_display_gets_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    play(True)
    told = capsys.readouterr()
    assert told.out == ""
    assert "2 sites take part: anker, birke" in told.err
    assert "round 1 of 3: AUROC 0.900, 20 patients, epsilon 0.80" in told.err


def test_a_terminal_has_a_display_unless_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    play(False)
    assert capsys.readouterr().err == ""
    play(None)
    assert "Training rounds" in capsys.readouterr().err


@dataclass
class Notebook:
    """Stands for IPython in a kernel: what it displayed and redrew."""

    shown: list[Any] = field(default_factory=list)
    updated: list[Any] = field(default_factory=list)

    def display(self, what: object, *, display_id: bool) -> Notebook:
        assert display_id
        self.shown.append(what)
        return self

    def update(self, what: object) -> None:
        self.updated.append(what)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    made = Notebook()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", made)
    monkeypatch.setattr(shown_progress, "_OFTEN_S", 0.0)
    return made


@pytest.mark.parametrize("progress", [None, True])
def test_a_notebook_has_a_bar_a_step_that_is_redrawn(
    notebook: Notebook, progress: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    play(progress)
    assert capsys.readouterr() == ("", "")
    assert [repr(one) for one in notebook.shown] == [
        "Drawing patients: 1 of 2",
        "Training rounds: 0 of 3 (before training)",
    ]
    assert [repr(one) for one in notebook.updated] == [
        "Drawing patients: 2 of 2",
        "Training rounds: 1 of 3 (round 1: AUROC 0.900 (0.800 to 1.000), epsilon 0.80)",
        "Training rounds: 2 of 3",
        "Training rounds: 3 of 3 (round 3: epsilon 1.20)",
    ]
    assert notebook.updated[1]._repr_html_() == (
        '<progress value="1" max="3"></progress> '
        "Training rounds: 1 of 3 (round 1: AUROC 0.900 (0.800 to 1.000), epsilon 0.80)"
    )


def test_a_notebook_is_not_redrawn_for_each_patient_but_for_the_last(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_progress, "_OFTEN_S", 1000.0)
    with shown(None) as display:
        for done in range(1, 101):
            display.count("Drawing patients", done, 100)
    assert len(notebook.shown) == 1
    assert [repr(one) for one in notebook.updated] == ["Drawing patients: 100 of 100"]


def test_a_bar_shows_no_markup_of_its_text(notebook: Notebook) -> None:
    with shown(None) as display:
        display.count("<b>", 1, 2)
    assert "<b>" not in notebook.shown[0]._repr_html_()


def test_ipython_on_a_terminal_is_no_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    play(None)
    assert capsys.readouterr() == ("", "")
