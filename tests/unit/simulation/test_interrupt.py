"""A simulation that a person interrupts says how to resume it, once it has a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cloister_fl.cli import main
from cloister_fl.server.rounds.checkpoint import Checkpoints
from support.federations import study_text


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["simulate", "demo"])
@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    begun: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoints, "exists", lambda self: begun)
    monkeypatch.setattr("cloister_fl.simulation.simulated_run.run_simulation", interrupt)
    monkeypatch.setattr("cloister_fl.simulation.demo.run_demo", interrupt)
    Path("my study.toml").write_text(study_text())
    words = {
        "simulate": ["my study.toml", "--sites", "s", "--holdout", "h", "--out", "run"],
        "demo": ["--out", "d"],
    }
    with pytest.raises(SystemExit) as ended:
        main.main([name, *words[name]])
    assert ended.value.code == 130
    *said, last = capsys.readouterr().err.strip().splitlines()
    assert last == "Stopped."
    if not begun:
        assert said == []
        return
    told, _, command = said[0].partition(": ")
    assert told == "Interrupted. To resume it"
    assert shlex.split(command) == {
        "simulate": ["cloister", "simulate", "my study.toml", "--sites", "s", "--holdout", "h",
                     "--out", "run", "--resume"],
        "demo": ["cloister", "simulate", "d/study.toml", "--sites", "d/data/sites",
                 "--holdout", "d/data/holdout", "--out", "d/run", "--resume"],
    }[name]  # fmt: skip
