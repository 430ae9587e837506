"""The coordinator's runs on disk, and what a kill between two files leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.errors import RunUnknown
from cloister_fl.server.coordinator.run_queue import (
    SUMMARY,
    RunFolder,
    Status,
    close_finished,
    find_run,
    keep_run,
    new_run,
    next_run,
    resume_run,
    stop_run,
    update_bytes,
)
from cloister_fl.server.rounds.checkpoint import Figures
from cloister_fl.server.rounds.events import Began, KeepWhatIsThere, Measured, Waiting
from cloister_fl.server.service.run_executor import _StatusWriter
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


def test_a_remedy_is_a_command_for_this_folder(tmp_path: Path) -> None:
    place = tmp_path / "my fed"
    with pytest.raises(RunUnknown) as error:
        find_run(place, "thorax-1")
    assert error.value.remedy == f"List the runs: cloister server status --dir '{place}'"
    run = _run(place)
    with pytest.raises(RunUnknown) as error:
        _run(place)
    assert error.value.remedy.endswith(f"server stop --run {run.name} --dir '{place}'")
    with pytest.raises(RunUnknown, match="is already running") as error:
        resume_run(run)
    assert error.value.remedy == f"See its status: cloister server status --dir '{place}'"
    run.tell(Status(state="failed"))
    with pytest.raises(RunUnknown, match="has ended already") as error:
        stop_run(run)
    assert error.value.remedy == f"See its status: cloister server status --dir '{place}'"
    (run.path / SUMMARY).write_text("{}")
    with pytest.raises(RunUnknown, match="is finished") as error:
        resume_run(run)
    assert error.value.remedy.endswith(f"server report {run.name} --dir '{place}'")


def test_the_port_knows_the_update_of_the_run_under_way_alone(tmp_path: Path) -> None:
    """By it the objects of a reply are bounded, while a run is under way and not after it."""
    assert update_bytes(tmp_path) == 0
    run = _run(tmp_path)
    assert update_bytes(tmp_path) == 0
    writer = _StatusWriter(run, Status())
    writer(Began(("a", "b"), {}, 3, (), update_bytes=44_000_000))
    writer(Measured(Figures(1, 2, 0.0, 0.0), 3))
    writer(Waiting(1, 2, {}))
    assert update_bytes(tmp_path) == 44_000_000
    run.tell(Status(state="failed", update_bytes=44_000_000))
    assert update_bytes(tmp_path) == 0


def test_a_run_that_is_kept_is_taken_up_and_ended_once(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with pytest.raises(RunUnknown, match="No round of the run") as error:
        keep_run(run)
    assert f"stop --run {run.name}" in error.value.remedy
    run.tell(Status(state="stopped", round=2, rounds=9))
    stopped = run.asked().model_copy(update={"wanted": False})
    run.ask(stopped)
    assert next_run(tmp_path) is None
    keep_run(run)
    assert next_run(tmp_path) == run
    writer = _StatusWriter(run, run.status())
    with pytest.raises(KeepWhatIsThere):
        writer.check()
    # What follows, as telling the sites, goes through.
    writer._looked = 0.0
    writer.check()
    (run.path / SUMMARY).write_text("{}")
    with pytest.raises(RunUnknown, match="is finished"):
        keep_run(run)
