"""Progress display of a run: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cloister_fl.metrics.figures import title_of
from cloister_fl.server.rounds.checkpoint import Figures, Released
from cloister_fl.server.rounds.collector import REASONS
from cloister_fl.server.rounds.events import Began, Event, Lost, ReleaseMade, Waiting
from cloister_fl.system.text import counted

LOST = "aggregation failed"
DISCARDED = "discarded, since its sum is larger than honest sites can send"


def in_words(event: Waiting) -> str:
    """Return what a run waits for, and why, as text."""
    reasons = "; ".join(
        f"{name}: {REASONS.get(reason, reason)}" for name, reason in sorted(event.refused.items())
    )
    told = (
        f"{counted(event.present, 'site takes', 'sites take')} part so far, "
        f"{event.needed} are needed"
    )
    return f"{told} ({reasons})" if reasons else told


class Display:
    """Shows steps and rounds on standard error, so that standard output stays for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._rich = sys.stderr.isatty() and not quiet
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._rich,
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def count(self, name: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of a step are done; plain lines at quarters."""
        if self._rich:
            self._advance(name, done, total, "")
        elif done in {max(1, total * quarter // 4) for quarter in range(1, 5)}:
            self.say(f"{name}: {done} of {total}")

    def __call__(self, event: Event) -> None:
        """Show an event of a run."""
        if isinstance(event, Began):
            self._began(event)
        elif isinstance(event, Lost):
            what = DISCARDED if event.is_discarded else LOST
            self.say(f"Round {event.round}: {what}; the privacy cost stays charged")
        elif isinstance(event, ReleaseMade):
            self.say(_released(event.release))
        elif isinstance(event, Waiting):
            self.say(in_words(event))
        else:
            self._measured(event.figures, event.rounds)

    def _began(self, event: Began) -> None:
        sites = counted(len(event.sites), "site takes", "sites take")
        self.say(f"{sites} part: {', '.join(event.sites)}")
        for name, reason in sorted(event.refused.items()):
            self.say(f"{name} does not take part: {REASONS.get(reason, reason)}")
        for number in event.lost:
            self.say(
                f"Round {number} was lost to a crash; its privacy cost stays charged, and it is "
                "not trained again"
            )

    def _measured(self, figures: Figures, rounds: int) -> None:
        parts = []
        if figures.metrics is not None:
            parts += [
                f"{title_of(name)} {one.value:.3f}"
                for name, one in figures.metrics.figures.items()
                if one is not None
            ]
            parts.append(counted(figures.metrics.patients, "patient"))
        if figures.epsilon is not None:
            parts.append(f"epsilon {figures.epsilon:.2f}")
        note = ", ".join(parts)
        if self._rich:
            self._advance("Training rounds", figures.round, rounds, note)
        elif figures.round == 0:
            self.say(f"before training: {note}" if note else "training starts")
        else:
            self.say(f"round {figures.round} of {rounds}: {note or 'done'}")

    def _advance(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)  # type: ignore[arg-type]


def _released(release: Released) -> str:
    if release.metrics is None:
        return "The noised evaluation failed; its privacy cost stays charged"
    found = [
        f"{title_of(name)} {one.value:.3f}"
        for name, one in release.metrics.figures.items()
        if one is not None
    ]
    told = ", ".join(found) or "no figure, since a label has too few patients"
    return f"noised evaluation on patients of {counted(release.sites, 'site')}: {told}"
