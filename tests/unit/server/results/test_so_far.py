"""The files of a run that goes on: what a kill, a full disk or a person does to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.errors import OutputInTheWay
from cloister_fl.model_file import load_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.server.results.so_far import SoFar
from cloister_fl.server.results.tracking import EventFiles
from cloister_fl.server.rounds.checkpoint import Figures, RunState
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study import build_network
from support import studies

STUDY = studies.study(
    network={"arguments": {"width": 4}}, training={"rounds": 9}, evaluation={"every": 2}
)
MODEL = flatten(build_network(STUDY))


def after(rounds: int) -> RunState:
    """The state after so many rounds; the model of each differs."""
    return RunState(
        run="ab" * 16,
        completed=rounds,
        model=MODEL + np.float32(rounds),
        optimizer=OptimizerState.fresh(MODEL.size, STUDY.aggregation),
        figures=tuple(Figures(number, 5, 1.0, 0.1) for number in range(rounds + 1)),
        started=dict.fromkeys("abcde", rounds),
    )


@pytest.fixture(autouse=True)
def _all_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What each writer has open, also those of a process that was killed."""
    made: list[EventFiles] = []
    begin = EventFiles.__init__

    def noted(self: EventFiles, out: Path) -> None:
        begin(self, out)
        made.append(self)

    monkeypatch.setattr(EventFiles, "__init__", noted)
    yield
    for one in made:
        one.close()


def rounds_told(out: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def shift(out: Path) -> float:
    """By how much the model on disk is above the initial one: the number of its round."""
    module, _ = load_model(out / "model.safetensors")
    return float(np.round(np.median(flatten(module) - MODEL)))


def test_metrics_grow_by_a_line_a_round_and_a_model_is_there(tmp_path: Path) -> None:
    so_far = SoFar(tmp_path, STUDY)
    so_far(replace(after(0), figures=()))
    assert list(tmp_path.iterdir()) == []
    so_far(after(0))
    assert not (tmp_path / "model.safetensors").exists()
    for number in range(1, 10):
        so_far(after(number))
        so_far(after(number))
        assert rounds_told(tmp_path) == list(range(number + 1))
        if number >= 2:
            # As often as it is measured, and at the end.
            assert shift(tmp_path) == (number if number == 9 else number // 2 * 2)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    so_far(after(9))
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


@pytest.mark.parametrize("left", ['{"round": 0}\n{"rou', "", None])
def test_what_a_killed_process_left_is_written_anew(tmp_path: Path, left: str | None) -> None:
    if left is not None:
        (tmp_path / "metrics.jsonl").write_text(left)
    SoFar(tmp_path, STUDY)(after(3))
    assert rounds_told(tmp_path) == [0, 1, 2, 3]


def test_a_file_that_somebody_moved_away_is_written_whole(tmp_path: Path) -> None:
    so_far = SoFar(tmp_path, STUDY)
    so_far(after(1))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "mine.jsonl")
    so_far(after(2))
    assert rounds_told(tmp_path) == [0, 1, 2]


def test_a_full_disk_is_told_and_the_rows_come_with_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    so_far = SoFar(tmp_path, STUDY)
    so_far(after(1))
    whole = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: whole(file, data[:7]))
        with pytest.raises(OutputInTheWay, match="disk may be full"):
            so_far(after(3))
    SoFar(tmp_path, STUDY)(after(3))
    assert rounds_told(tmp_path) == [0, 1, 2, 3]
