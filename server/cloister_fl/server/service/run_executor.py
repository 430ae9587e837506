"""Run executor: the process that executes the runs of the coordinator's folder DIR, one by one.

Started as ``python -P -m cloister_fl.server.service.run_executor DIR``.

It runs the ServerApp of the installed wheel, and no bundle's code. It ends after each run, so the
next one starts from a fresh process; the server starts it again. What interrupts it, a crash
included, leaves the run wanted, and the next process goes on from the checkpoint.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_fl.errors import CloisterError, InternalError, NothingToResume, RunStopped
from cloister_fl.server.coordinator.folder import Coordinator, open_coordinator
from cloister_fl.server.coordinator.run_queue import (
    DONE,
    STOPPED,
    RunFolder,
    Status,
    close_finished,
    failure,
    next_run,
)
from cloister_fl.system.child_process import child, tell, tell_failed

if TYPE_CHECKING:
    from cloister_fl.tasks.divided_holdout import Holdout

IDLE_S = 1.0
_CHECK_S = 1.0


@dataclass
class _StatusWriter:
    """Writes the status of the run, and ends the run where a person stopped it."""

    run: RunFolder
    status: Status
    _looked: float = 0.0
    _is_ending: bool = False

    def say(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        self.run.tell(self.status)

    def check(self) -> None:
        now = time.monotonic()
        if now - self._looked < _CHECK_S:
            return
        self._looked = now
        asked = self.run.asked()
        if asked.keep and not self._is_ending:
            from cloister_fl.server.rounds.events import KeepWhatIsThere

            self._is_ending = True
            raise KeepWhatIsThere
        if not asked.wanted:
            raise RunStopped(
                "The run was stopped.",
                remedy="To resume it: "
                f"cloister server resume {self.run.name}{self.run.folder_option}",
            )

    def __call__(self, event: object) -> None:
        from cloister_fl.server.results.progress import in_words
        from cloister_fl.server.rounds.events import Began, Lost, Measured, Waiting

        match event:
            case Waiting():
                self.say(state="waiting", told=in_words(event), refused=dict(event.refused))
            case Began():
                self.say(
                    state="training",
                    told="training",
                    rounds=event.rounds,
                    update_bytes=event.update_bytes,
                    sites=event.sites,
                    refused=dict(event.refused),
                )
            case Lost():
                how = (
                    "was discarded, since its sum is larger than honest sites can send"
                    if event.is_discarded
                    else "failed"
                )
                self.say(state="training", round=event.round, told=f"round {event.round} {how}")
            case Measured():
                number = event.figures.round
                self.say(state="training", round=number, told=f"round {number} is done")


def execute(place: Coordinator, run: RunFolder) -> None:
    """Execute a run to its end, or to the next interruption."""
    study = run.study()
    writer = _StatusWriter(run, replace(run.status(), rounds=study.training.rounds))
    writer.say(state="waiting", told="starting", code="")
    try:
        _run(place, run, writer)
    except RunStopped as error:
        writer.say(state=STOPPED, told=error.what, code=error.code)
    except CloisterError as error:
        if error.code == NothingToResume.code:
            from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER

            error.remedy = (
                f"Restore {run.path / CHECKPOINT_FOLDER} from a backup, or run the study anew: "
                f"cloister server run STUDY-FILE{run.folder_option}"
            )
        run.tell(failure(error, writer.status))
    except Exception as error:
        if _is_connection(error):
            # The server ends, or began anew without us: the run stays wanted.
            raise
        fault = InternalError(
            f"Internal error ({type(error).__name__}).",
            remedy="Report it, with the version of Cloister and the study file.",
        )
        run.tell(failure(fault, writer.status))
    else:
        writer.say(state=DONE, told="finished")


def _run(place: Coordinator, run: RunFolder, writer: _StatusWriter) -> None:
    from cloister_fl.server.app import build
    from cloister_fl.server.flower import runtime
    from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints
    from cloister_fl.server.rounds.events import Hooks, Patience

    asked, study = run.asked(), run.study()
    sites = len(place.federation().roster().entries)
    hooks = Hooks(
        holdout=_holdout(run, asked.holdout),
        notify=writer,
        check=writer.check,
        patience=Patience(begin=asked.wait),
        timeout=asked.timeout,
    )
    server_app = build(hooks)
    with runtime.running(place.socket, place.token(), place.executor_secret()) as (grid, context):
        context.run_config = {
            "study": study.canonical(),
            "out": str(run.path),
            "federation": str(place.keys),
            "expected": sites,
            "resume": Checkpoints(run.path / CHECKPOINT_FOLDER).exists(),
            "signatures": asked.signatures,
        }
        server_app(grid, context)


def _holdout(run: RunFolder, folder: str) -> Holdout | None:
    if not folder:
        return None
    from cloister_fl.server.results.holdout_reader import read_holdout

    return read_holdout(run.study(), Path(folder), run.path)


def _is_connection(error: Exception) -> bool:
    import httpx

    return isinstance(error, httpx.TransportError | httpx.HTTPStatusError)


def main(folder: Path) -> None:
    """Wait for a run that is wanted, and execute it."""
    place = open_coordinator(folder)
    close_finished(place.root)
    tell("ready")
    while (run := next_run(place.root)) is None:
        time.sleep(IDLE_S)
    tell("run", name=run.name)
    execute(place, run)
    tell("run-ended", name=run.name, state=run.status().state)


if __name__ == "__main__":
    with child():
        try:
            main(Path(sys.argv[1]))
        except CloisterError as error:
            tell_failed(error)
            sys.exit(error.exit_status)
