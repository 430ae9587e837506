"""Events of a run, and the hooks that its caller adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cloister_fl.server.rounds.checkpoint import Figures, Released, RunState
from cloister_fl.tasks.divided_holdout import Holdout


@dataclass(frozen=True)
class Began:
    """The run has started with these sites; ``refused`` gives the others' reasons.

    ``update_bytes`` is the size of one site's update, masked or not.
    """

    sites: tuple[str, ...]
    refused: Mapping[str, str]
    rounds: int
    lost: tuple[int, ...]
    update_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """A round has a model, which was evaluated where the study allows it."""

    figures: Figures
    rounds: int


@dataclass(frozen=True)
class Lost:
    """A round failed for good; its privacy cost stays charged.

    ``is_discarded`` where there was a sum, which no honest sites can give.
    """

    round: int
    is_discarded: bool = False


@dataclass(frozen=True)
class Waiting:
    """Too few sites are here; the run waits for them. ``refused`` gives the others' reasons."""

    present: int
    needed: int
    refused: Mapping[str, str]


@dataclass(frozen=True)
class ReleaseMade:
    """The study's noised evaluation was requested; ``release`` has its result."""

    release: Released


Event = Began | Measured | Lost | ReleaseMade | Waiting


def _ignore(event: Event) -> None:
    del event


def _unseen(state: RunState) -> None:
    del state


def _nothing() -> None:
    pass


class KeepWhatIsThere(Exception):
    """Raised by ``Hooks.check``: the round under way is given up, and the run has its results."""


@dataclass(frozen=True)
class Patience:
    """How long a deployed run waits for approvals and for sites that are offline.

    Attributes:
        begin: seconds that a run which could begin waits for sites that have not answered yes.
        soonest: seconds between the first two questions.
        latest: seconds between two questions, at most.
    """

    begin: float = 3600.0
    soonest: float = 2.0
    latest: float = 30.0


@dataclass(frozen=True)
class Hooks:
    """What the caller adds to a run.

    Attributes:
        holdout: patients of no site, on whom models are measured.
        notify: is told of progress.
        check: is called again and again, and may raise to end the run; ``KeepWhatIsThere`` ends it
            as if the study had no more rounds.
        patience: how to wait where too few sites are here; without it that is an error.
        timeout: seconds after which a stage goes on without those who have not answered; None
            waits for all.
        saved: is given the state each time that a checkpoint holds it.
    """

    holdout: Holdout | None = None
    notify: Callable[[Event], None] = _ignore
    check: Callable[[], None] = _nothing
    patience: Patience | None = None
    timeout: float | None = None
    saved: Callable[[RunState], None] = _unseen
