"""Checkpoints: what was saved comes back, and a crash between two writes loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.errors import NothingToResume, ResumeMismatch
from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.rounds.checkpoint import Checkpoints, Figures, Progress, RunState
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from support import studies
from support.errors import raises


@pytest.fixture
def study() -> Study:
    return studies.study()


METRICS = Metrics({"auroc": Estimate(0.5, 0.25, 0.75), "auprc": None}, 20, (12, 8))


def _state(completed: int = 2) -> RunState:
    return RunState(
        run="ab" * 16,
        completed=completed,
        model=np.arange(5, dtype=np.float32),
        optimizer=OptimizerState(np.ones(5, np.float32), np.full(5, 0.25, np.float32)),
        figures=(Figures(0, 0, 0.0, 0.0, metrics=METRICS), Figures(1, 5, 1.5, 0.25, epsilon=1.25)),
        lost=(1,),
        invited=("north", "south"),
        started={"north": 2},
        sent={"north": 4096},
        seconds=3.5,
    )


def test_the_state_comes_back_whole(tmp_path: Path, study: Study) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    checkpoints.save(study, _state())
    state, progress = checkpoints.load(study)
    saved = _state()
    np.testing.assert_array_equal(state.model, saved.model)
    np.testing.assert_array_equal(state.optimizer.first, saved.optimizer.first)
    np.testing.assert_array_equal(state.optimizer.second, saved.optimizer.second)
    assert (state.run, state.completed, state.figures) == (saved.run, 2, saved.figures)
    assert (state.lost, state.started, state.sent, state.seconds) == (
        (1,),
        {"north": 2},
        {"north": 4096},
        3.5,
    )
    assert state.invited == ("north", "south")
    assert state.average is None
    np.testing.assert_array_equal(state.released, saved.model)
    assert progress == Progress()


def test_the_moving_average_comes_back(tmp_path: Path, study: Study) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    average = np.full(5, 7.5, np.float32)
    checkpoints.save(study, replace(_state(), average=average))
    state, _ = checkpoints.load(study)
    assert state.average is not None
    np.testing.assert_array_equal(state.average, average)
    np.testing.assert_array_equal(state.released, average)
    np.testing.assert_array_equal(state.model, _state().model)


def test_a_round_that_was_sent_and_not_finished_is_known(tmp_path: Path, study: Study) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(study, _state(completed=2))
    marked = Progress(3, ("north", "south"), {6: ("north",), 7: ("north", "south")})
    checkpoints.mark(marked)
    assert checkpoints.load(study)[1] == marked


def test_another_study_is_refused(tmp_path: Path, study: Study) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(study, _state())
    other = studies.study(privacy={"epsilon": 2})
    with raises(ResumeMismatch, match="CLO-503"):
        checkpoints.load(other)


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path, study: Study) -> None:
    with raises(NothingToResume, match="CLO-504"):
        Checkpoints(tmp_path).load(study)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x80\x04K\x01."])
def test_a_damaged_checkpoint_is_a_named_error(tmp_path: Path, study: Study, damage: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(study, _state())
    (tmp_path / "state.safetensors").write_bytes(damage)
    with raises(NothingToResume):
        checkpoints.load(study)


def test_a_write_that_is_cut_short_keeps_the_old_state(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(study, _state(completed=2))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        patched.setattr("os.rename", killed)
        patched.setattr("pathlib.Path.rename", killed)
        patched.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(study, _state(completed=3))
    state, _ = checkpoints.load(study)
    assert state.completed == 2
