"""A package of our import name in the working directory is never run: it would beat a namespace."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.study.schema import Input
from cloister_fl.system.child_process import Child, environment
from support.federations import study_text, write_federation

PLANTED = """
import pathlib
(pathlib.Path(__file__).parent.parent / "was-run").touch()
raise SystemExit("a planted package was run")
"""
COMMAND = Path(sys.executable).with_name("cloister")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has packages of our import name and of the foreign distribution."""
    for name in ("cloister_fl", "cloister"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plant_works(planted: Path) -> None:
    """Without -P it is run: so the tests below would see it."""
    done = subprocess.run(
        [sys.executable, "-c", "import cloister_fl.errors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "planted" in done.stderr
    assert (planted / "was-run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("study", "new", "study.toml"),
        ("client", "init", "north"),
        ("server", "init", "fed", "--address", "127.0.0.1:9443"),
    ],
)
def test_the_command_does_not_run_it(planted: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, check=False, env=_without_path()
    )
    assert done.returncode == 0, done.stderr
    assert not (planted / "was-run").exists()


def test_a_child_process_does_not_run_it(planted: Path) -> None:
    events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    told = "import json, cloister_fl.errors as e; print(json.dumps({'file': e.__file__}))"
    base = {**_without_path(), "PYTHONPATH": os.pathsep}
    child = Child("child", ("-c", told), environment(base=base), events)
    child.tend()
    found: dict[str, Any] = {}
    end = time.monotonic() + 60
    while "file" not in found and time.monotonic() < end:
        found = events.get(timeout=60)[1]
        assert found.get("event") in {None, "started"}
    child.stop()
    assert Path(found["file"]).parts[-2:] == ("errors", "__init__.py")
    assert not Path(found["file"]).is_relative_to(planted)
    assert not (planted / "was-run").exists()


def test_a_dicom_worker_does_not_run_it(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As ``python -c`` and an interactive interpreter have it: the working folder, for each import.
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    pool = Pool(1)
    try:
        with pytest.raises(RejectedFile):
            pool.submit(b"no DICOM", Input()).result(timeout=60)
    finally:
        pool.close()
    assert not (planted / "was-run").exists()


def test_the_command_imports_nothing_from_an_empty_part_of_the_module_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``PYTHONPATH=$UNSET:/opt/lib``: Python takes the empty part for the working folder."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    variables = {**os.environ, "PYTHONPATH": f"{os.pathsep}/nowhere"}
    plain = subprocess.run(
        [sys.executable, "-P", "-c", "import numpy"],
        capture_output=True, text=True, check=False, env=variables,
    )  # fmt: skip
    assert "planted" in plain.stderr
    (tmp_path / "was-run").unlink()
    for words in (["client", "init", "north"], ["client", "check", "--offline", "--dir", "north"]):
        done = subprocess.run(
            [COMMAND, *words], capture_output=True, text=True, check=False, env=variables
        )
        assert "planted" not in done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "north" / "site.toml").is_file()
    assert not (tmp_path / "was-run").exists()


@pytest.mark.slow
def test_rays_processes_do_not_run_it(planted: Path) -> None:
    """Ray puts the working folder first on its processes' path, whatever they are told."""
    write_federation(planted / "sites")
    (planted / "study.toml").write_text(
        study_text(privacy={"enabled": False}, training={"rounds": 1})
    )
    words = ["simulate", "study.toml", "--sites", "sites", "--out", "out", "--engine", "ray"]
    done = subprocess.run(
        [COMMAND, *words], capture_output=True, text=True, check=False, env=_without_path()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (planted / "out" / "model.safetensors").exists()
    assert not (planted / "was-run").exists()


def _without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
