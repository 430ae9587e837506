"""Event files hold the rows of a run, and are there as soon as a row is."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.results.tracking import EventFiles
from cloister_fl.server.rounds.checkpoint import Figures


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
