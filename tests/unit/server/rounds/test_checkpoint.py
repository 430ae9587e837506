"""Checkpoints: what was saved comes back, and a crash between two writes loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cloister_fl.errors import NothingToResume, ResumeMismatch
from cloister_fl.metrics.figures import Estimate, Metrics
from cloister_fl.server.rounds import checkpoint
from cloister_fl.server.rounds.checkpoint import (
    Checkpoints,
    Figures,
    Progress,
    Released,
    RunState,
)
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.study.schema import Study
from support import studies
from support.errors import raises


@pytest.fixture
def study() -> Study:
    return studies.study(aggregation={"strategy": "fedadam", "ema": 0.5})


METRICS = Metrics(
    {"auroc": Estimate(0.5, 0.25, 0.75), "auprc": None, "balanced_accuracy": Estimate(1, 1, 1)},
    20,
    (12, 8),
)


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


STATE = Path("state.safetensors")


def _rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Save the state again, with other fields or other arrays."""
    with safe_open(folder / STATE, framework="np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = json.loads(metadata["state"])
    change(fields, arrays)
    save_file(arrays, folder / STATE, metadata={**metadata, "state": json.dumps(fields)})


FIELDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field is missing": lambda told: told.pop("figures"),
    "a field too many": lambda told: told.update(extra=1),
    "a word for a number": lambda told: told.update(completed="x"),
    "a number as a word": lambda told: told.update(completed="2"),
    "truth for a number": lambda told: told.update(completed=True),
    "below zero": lambda told: told.update(completed=-1),
    "beyond the study": lambda told: told.update(completed=1000),
    "none for a table": lambda told: told.update(started=None),
    "a list for a table": lambda told: told.update(started=["north"]),
    "more rounds than there are": lambda told: told["started"].update(north=1000),
    "no number": lambda told: told.update(seconds=float("nan")),
    "no run": lambda told: told.update(run=""),
    "lost and not sent": lambda told: told.update(lost=[3]),
    "lost twice": lambda told: told.update(lost=[1, 1]),
    "figures of a later round": lambda told: told["figures"][1].update(round=3),
    "figures in no order": lambda told: told["figures"].reverse(),
    "figures too many": lambda told: told["figures"][0].update(kind="x"),
    "figures without a field": lambda told: told["figures"][0].pop("epsilon"),
    "metrics without patients": lambda told: told["figures"][0]["metrics"].pop("patients"),
    "a figure of no task": lambda told: told["figures"][0]["metrics"].update(foo=None),
    "a figure of another task": lambda told: told["figures"][0]["metrics"].update(dice=None),
    "a figure is missing": lambda told: told["figures"][0]["metrics"].pop("auprc"),
    "a figure above one": lambda told: told["figures"][0]["metrics"]["auroc"].update(value=1.5),
    "outside its interval": lambda told: told["figures"][0]["metrics"]["auroc"].update(low=0.6),
    "a class too many": lambda told: told["figures"][0]["metrics"].update(class_counts=[1, 2, 3]),
    "an evaluation of none": lambda told: told["release"].pop("asked"),
}
ARRAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda arrays: arrays.pop("model"),
    "no moments": lambda arrays: arrays.pop("second"),
    "another array": lambda arrays: arrays.update(third=arrays["model"]),
    "short moments": lambda arrays: arrays.update(first=arrays["first"][:3]),
    "a matrix": lambda arrays: arrays.update(model=arrays["model"].reshape(1, 5)),
    "another type": lambda arrays: arrays.update(model=arrays["model"].astype(np.float64)),
    "not finite": lambda arrays: arrays.update(average=np.full(5, np.inf, np.float32)),
}


def _whole(folder: Path, study: Study) -> Checkpoints:
    """A checkpoint with all that there can be, which is sound."""
    checkpoints = Checkpoints(folder)
    release = Released(("north", "south"), 2, 1.5, METRICS)
    checkpoints.save(study, replace(_state(), average=np.ones(5, np.float32), release=release))
    checkpoints.mark(Progress(3, ("north",), {6: ("north",)}))
    _rewritten(folder, lambda *_: None)
    assert checkpoints.load(study)[0].release == release
    return checkpoints


@pytest.mark.parametrize("what", FIELDS)
def test_a_checkpoint_with_a_damaged_field_is_a_named_error(
    tmp_path: Path, study: Study, what: str
) -> None:
    checkpoints = _whole(tmp_path, study)
    _rewritten(tmp_path, lambda fields, _: FIELDS[what](fields))
    with raises(NothingToResume, match="CLO-504"):
        checkpoints.load(study)


@pytest.mark.parametrize("what", ARRAYS)
def test_a_checkpoint_with_a_damaged_array_is_a_named_error(
    tmp_path: Path, study: Study, what: str
) -> None:
    checkpoints = _whole(tmp_path, study)
    _rewritten(tmp_path, lambda _, arrays: ARRAYS[what](arrays))
    with raises(NothingToResume, match="CLO-504"):
        checkpoints.load(study)


def test_arrays_that_the_study_does_not_keep_are_a_named_error(tmp_path: Path) -> None:
    plain = studies.study()
    none = OptimizerState(np.zeros(0, np.float32), np.zeros(0, np.float32))
    sound = replace(_state(), optimizer=none)
    Checkpoints(tmp_path).save(plain, sound)
    assert Checkpoints(tmp_path).load(plain)[0].completed == 2
    for other in (_state(), replace(sound, average=np.ones(5, np.float32))):
        Checkpoints(tmp_path).save(plain, other)
        with raises(NothingToResume, match="CLO-504"):
            Checkpoints(tmp_path).load(plain)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"round": null, "sites": [], "answered": {}}',
        '{"round": "3", "sites": [], "answered": {}}',
        '{"round": 3, "sites": "north", "answered": {}}',
        '{"round": 3, "sites": [1], "answered": {}}',
        '{"round": 3, "sites": [], "answered": []}',
        '{"round": 3, "sites": [], "answered": {"x": []}}',
        '{"round": 3, "sites": [], "answered": {}, "more": 1}',
        '{"round": 1000, "sites": [], "answered": {}}',
    ],
)
def test_damaged_progress_is_a_named_error(tmp_path: Path, study: Study, text: str) -> None:
    checkpoints = _whole(tmp_path, study)
    (tmp_path / "progress.json").write_text(text)
    with raises(NothingToResume, match="CLO-504"):
        checkpoints.load(study)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x80\x04K\x01."])
def test_a_damaged_checkpoint_is_a_named_error(tmp_path: Path, study: Study, damage: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(study, _state())
    (tmp_path / STATE).write_bytes(damage)
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


# Figures of many rounds are sealed, a hundred at a time.


def _long(rounds: int) -> RunState:
    figures = (Figures(number, 3, 1.5, 0.25, epsilon=1.25) for number in range(rounds + 1))
    return replace(_state(rounds), figures=tuple(figures), lost=())


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(checkpoint, "FIGURES_A_SEGMENT", 10)
    return studies.study(training={"rounds": 60})


def test_what_is_written_a_round_does_not_grow_with_the_rounds(tmp_path: Path, many: Study) -> None:
    sizes = []
    for checkpoints in (Checkpoints(tmp_path), Checkpoints(tmp_path)):
        for number in range(60):
            state = replace(_long(number), optimizer=_NONE)
            checkpoints.save(many, state)
            sizes.append((tmp_path / STATE).stat().st_size)
            assert checkpoints.load(many)[0].figures == state.figures
    # 64 digits of a segment's hash, and no more, for ten rounds.
    assert max(sizes[50:60]) < max(sizes[:10]) + 6 * 80
    assert len(list(tmp_path.glob("figures-*.jsonl"))) == 6


_NONE = OptimizerState(np.zeros(0, np.float32), np.zeros(0, np.float32))


@pytest.mark.parametrize(
    "harm",
    [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff" * 9)],
)
def test_a_segment_that_is_missing_or_altered_is_a_named_error(
    tmp_path: Path, many: Study, harm: Callable[[Path], object]
) -> None:
    Checkpoints(tmp_path).save(many, replace(_long(30), optimizer=_NONE))
    assert len(Checkpoints(tmp_path).load(many)[0].figures) == 31
    harm(tmp_path / "figures-000002.jsonl")
    with raises(NothingToResume, match="CLO-504"):
        Checkpoints(tmp_path).load(many)


def test_killed_between_a_segment_and_its_state_nothing_is_lost_or_doubled(
    tmp_path: Path, many: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(many, replace(_long(8), optimizer=_NONE))
    write = checkpoint.write_atomic

    def killed(path: Path, data: bytes) -> None:
        if path.name == STATE.name:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(many, replace(_long(9), optimizer=_NONE))
    assert (tmp_path / "figures-000001.jsonl").exists()
    again = Checkpoints(tmp_path)
    assert again.load(many)[0].completed == 8
    again.save(many, replace(_long(9), optimizer=_NONE))
    assert again.load(many)[0].figures == _long(9).figures
