"""Figures by round as TensorBoard event files, where the extra ``tracking`` is installed.

They hold what ``metrics.jsonl`` holds, for whoever compares runs in TensorBoard or in a tool that
reads its files. Nothing is sent anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.system.files import unwritable

FOLDER = "tensorboard"


class EventFiles:
    """Writes the rows of a run; nothing where tensorboardX is not installed.

    Args:
        out: the folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER
        self._writer: Any = None

    def add(self, rows: Sequence[Figures]) -> None:
        """Add rounds; they are on disk when it returns.

        A round that is told again, as by a resumed run, is shown once.

        Raises:
            OutputInTheWay: they cannot be written.
        """
        try:
            # Not ``SummaryWriter``: it writes behind the caller, from a thread and a queue.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar
        except ModuleNotFoundError:
            return
        try:
            if self._writer is None:
                self._folder.mkdir(exist_ok=True)
                self._writer = EventsWriter(str(self._folder / "events"))
            for row in rows:
                for name, value in _scalars(row):
                    told = scalar(name, value)
                    event = Event(wall_time=time.time(), step=row.round, summary=told)
                    self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from None

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _scalars(row: Figures) -> Iterator[tuple[str, float]]:
    for part, metrics in (("reported", row.metrics), ("selecting", row.selecting)):
        for name, one in (metrics.figures if metrics else {}).items():
            if one is not None:
                yield f"{part}/{name}", one.value
                yield f"{part}/{name}_low", one.low
                yield f"{part}/{name}_high", one.high
        if metrics is not None:
            yield f"{part}/patients", metrics.patients
    if row.epsilon is not None:
        yield "privacy/epsilon", row.epsilon
    yield "round/sites", row.sites
    yield "round/seconds", row.seconds
    yield "round/update_norm", row.update_norm
