"""Progress of a simulation, for a callback, a terminal or a notebook."""

from __future__ import annotations

import contextlib
import html
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from cloister_fl.simulation.result import Round, round_of
from cloister_fl.system.libraries.imports import undisturbed_imports

if TYPE_CHECKING:
    from cloister_fl.server.rounds.events import Event

TRAINING = "Training rounds"
_OFTEN_S = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a simulation has come.

    Attributes:
        step: what is under way, such as ``Training rounds``.
        done: how many of the step's parts are done; rounds that were lost count as done.
        total: how many there are.
        round: figures of the round that has just been trained; else None.
    """

    step: str
    done: int
    total: int
    round: Round | None = None

    def __str__(self) -> str:
        about = f" ({self.round})" if self.round else ""
        return f"{self.step}: {self.done} of {self.total}{about}"


ProgressCallback: TypeAlias = Callable[[Progress], object]
"""Called with each ``Progress``. What it raises ends the simulation once the round is saved."""


class Shown(Protocol):
    """What a simulation tells of its progress."""

    def count(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of a step are done."""

    def __call__(self, event: Event) -> None:
        """An event of a run."""


@contextlib.contextmanager
def shown(progress: bool | ProgressCallback | None) -> Iterator[Shown]:
    """Yield what shows progress as the caller wishes.

    Args:
        progress: see ``simulate``.
    """
    if callable(progress):
        yield _Told(progress)
    elif progress is False:
        yield _Told(_ignore)
    elif _in_notebook():
        yield _Told(_NotebookBar())
    elif progress or sys.stderr.isatty():
        with undisturbed_imports():
            from cloister_fl.server.results.progress import Display
        with Display() as display:
            yield display
    else:
        yield _Told(_ignore)


class RaisesLater:
    """Tells of events, and keeps what is raised then until ``check`` is called.

    A round is told of before it is saved: what a callback raises must not cost it.
    """

    def __init__(self, display: Shown) -> None:
        self._display = display
        self._raised: BaseException | None = None

    def __call__(self, event: Event) -> None:
        if self._raised is None:
            try:
                self._display(event)
            except BaseException as error:
                self._raised = error

    def check(self) -> None:
        """Raise what was kept."""
        if self._raised is not None:
            raise self._raised


class _Told:
    """Turns events into ``Progress``."""

    def __init__(self, callback: ProgressCallback) -> None:
        self._callback = callback
        self._rounds = 0

    def count(self, name: str, done: int, total: int) -> None:
        self._callback(Progress(name, done, total))

    def __call__(self, event: Event) -> None:
        from cloister_fl.server.rounds.events import Began, Lost, Measured

        if isinstance(event, Began):
            self._rounds = event.rounds
        elif isinstance(event, Measured):
            told = round_of(event.figures.to_json())
            self._callback(Progress(TRAINING, told.number, event.rounds, told))
        elif isinstance(event, Lost):
            self._callback(Progress(TRAINING, event.round, self._rounds))


class _NotebookBar:
    """One bar a step, below the cell that runs; also where ipywidgets is not installed."""

    def __init__(self) -> None:
        self._display: Any = importlib.import_module("IPython.display")
        self._bars: dict[str, Any] = {}
        self._drawn = 0.0

    def __call__(self, progress: Progress) -> None:
        bar = self._bars.get(progress.step)
        now = time.monotonic()
        if bar is not None and progress.done < progress.total and now < self._drawn + _OFTEN_S:
            return
        self._drawn = now
        drawn = _Drawn(progress)
        if bar is None:
            self._bars[progress.step] = self._display.display(drawn, display_id=True)
        else:
            bar.update(drawn)


class _Drawn:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __repr__(self) -> str:
        return str(self._progress)

    def _repr_html_(self) -> str:
        given = self._progress
        bar = f'<progress value="{given.done}" max="{given.total}"></progress>'
        return f"{bar} {html.escape(str(given))}"


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython on a terminal has no kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", _none)()
    return hasattr(shell, "kernel")


def _none() -> None:
    return None


def _ignore(progress: Progress) -> None:
    del progress
