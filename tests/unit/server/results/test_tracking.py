"""Event files hold the rows of a run, and are there as soon as a row is."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from cloister_fl.errors import OutputInTheWay
from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.results.tracking import EventFiles
from cloister_fl.server.rounds.checkpoint import Figures
from support.errors import raises


def read(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars by name and step: records of a length, its checksum, an event, its checksum."""
    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            found |= {(one.tag, event.step): one.simple_value for one in event.summary.value}
    return found


def test_each_row_is_there_when_it_was_told(tmp_path: Path) -> None:
    metrics = Metrics({"auroc": Estimate(0.75, 0.5, 1.0), "auprc": None}, 20, (12, 8), 30)
    files = EventFiles(tmp_path)
    files.add([Figures(0, 0, 0.0, 0.0)])
    files.add([Figures(1, 5, 2.5, 0.25, 1.5, metrics, metrics)])
    told = read(tmp_path / "tensorboard")
    assert told["reported/auroc", 1] == told["selecting/auroc", 1] == 0.75
    assert told["reported/auroc_low", 1] == 0.5
    assert (told["reported/patients", 1], told["privacy/epsilon", 1]) == (20, 1.5)
    assert (told["round/sites", 1], told["round/sites", 0]) == (5, 0)
    assert not any("auprc" in name for name, _ in told)
    files.close()


def test_event_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file of somebody's")
    with raises(OutputInTheWay, match="tensorboard cannot be written"):
        EventFiles(tmp_path).add([Figures(0, 0, 0.0, 0.0)])


def test_a_full_disk_under_the_event_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = EventFiles(tmp_path)
    files.add([Figures(0, 0, 0.0, 0.0)])

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files._writer, "flush", full)
        with raises(OutputInTheWay, match="No space left on device"):
            files.add([Figures(1, 5, 2.5, 0.25, 1.5)])
    files.close()
