"""What a run leaves as it goes: figures by the round, and a model that can be used.

A run of days that is killed, or that nobody resumes, has then given something. The files are those
of a finished run; what says that it is finished is the summary, which is written last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from cloister_fl.errors import OutputInTheWay
from cloister_fl.model_file import save_model
from cloister_fl.server.results.artifacts import METRICS, site_epsilons
from cloister_fl.server.results.report import MODEL
from cloister_fl.server.results.tracking import EventFiles
from cloister_fl.server.rounds.checkpoint import RunState
from cloister_fl.server.rounds.model_choice import delivered
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic


class SoFar:
    """Writes what a run has, each time that its state was saved.

    Args:
        out: the folder of the run.
        study: what is trained.
    """

    def __init__(self, out: Path, study: Study) -> None:
        self._out = out
        self._study = study
        self._events = EventFiles(out)
        self._told: int | None = None
        """Rows of the metrics file; None as long as it may be an earlier process's."""

    def __call__(self, state: RunState) -> None:
        """Add the rows that are new, and replace the model where a round was due to be measured.

        Raises:
            OutputInTheWay: a file cannot be written.
        """
        if not (self._out / METRICS).exists():
            self._told = None
        new = state.figures[self._told or 0 :]
        if not new:
            return
        rows = "".join(f"{json.dumps(figures.to_json())}\n" for figures in new).encode()
        if self._told is None:
            # Whole: what was killed while it wrote can have left half a row.
            write_atomic(self._out / METRICS, rows, mode=0o644)
        else:
            _append(self._out / METRICS, rows)
        self._told = len(state.figures)
        self._events.add(new)
        number, every = new[-1].round, self._study.evaluation.every
        if number and (number % every == 0 or number == self._study.training.rounds):
            handed = delivered(self._study, state)
            facts = self._facts(state) | {"round": handed.figures.round}
            save_model(self._out / MODEL, self._study, handed.model, facts)

    def close(self) -> None:
        """Close what is open."""
        self._events.close()

    def _facts(self, state: RunState) -> dict[str, object]:
        known = [one for one in site_epsilons(self._study, state).values() if one is not None]
        private = self._study.privacy.enabled
        return {
            "epsilon_max": max(known) if known else None,
            "delta": self._study.privacy.delta if private else None,
            "rounds": state.completed,
            "sites": state.figures[-1].sites,
        }


def _append(path: Path, data: bytes) -> None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            if os.write(file, data) != len(data):
                raise OSError(0, "The disk may be full")
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise OutputInTheWay(
            f"{path.name} cannot be written.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Make room, or leave the file to the run; then resume it.",
        ) from None
