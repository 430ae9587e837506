"""The coordinator's runs on disk, and what a kill between two files leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.server.coordinator.run_queue import (
    SUMMARY,
    RunFolder,
    Status,
    close_finished,
    new_run,
    next_run,
)
from support.federations import study


def _run(root: Path) -> RunFolder:
    return new_run(root, study(), wait=1, timeout=1, holdout=None)


def test_a_run_that_was_killed_behind_its_summary_is_done(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.tell(Status(state="training", round=2, rounds=3, sites=("a", "b"), told="round 2 is done"))
    (run.path / SUMMARY).write_text("{}")
    assert next_run(tmp_path) is None
    close_finished(tmp_path)
    status = run.status()
    assert (status.state, status.round, status.told) == ("done", 3, "finished")
    assert status.sites == ("a", "b")
    # Another run of the very study is not in its way.
    assert _run(tmp_path).name != run.name


@pytest.mark.parametrize("state", ["waiting", "training", "stopped", "failed"])
def test_a_run_without_a_model_is_not_done(tmp_path: Path, state: str) -> None:
    run = _run(tmp_path)
    run.tell(Status(state=state, told="as before"))
    close_finished(tmp_path)
    assert (run.status().state, run.status().told) == (state, "as before")
