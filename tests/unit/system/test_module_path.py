"""The working folder is no place to import from, unless it is named; see also integration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cloister_fl.system import module_path
from cloister_fl.system.child_process import environment
from cloister_fl.system.module_path import forget_working_folder, path_of_children

COMMON = Path(module_path.__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    # Set first, so that whatever is left of it is undone after the test.
    monkeypatch.setenv("PYTHONPATH", "x")
    return tmp_path


def forgotten(here: Path, value: str) -> bool:
    """Whether the working folder is gone from the path that Python makes of the variable."""
    made = [os.path.abspath(part) for part in value.split(os.pathsep)]  # noqa: PTH100
    sys.path[:] = [*made, "/lib/python"]
    os.environ["PYTHONPATH"] = value
    forget_working_folder()
    assert sys.path[-1] == "/lib/python"
    return str(here) not in sys.path


@pytest.mark.parametrize(
    ("value", "left"),
    [(":", None), ("::", None), (":/opt", "/opt"), ("/opt:", "/opt"), ("/opt::/a", "/opt:/a")],
)
def test_an_empty_part_is_forgotten_and_the_others_stay(
    here: Path, value: str, left: str | None
) -> None:
    assert forgotten(here, value)
    assert os.environ.get("PYTHONPATH") == left
    assert sys.path[:-1] == [part for part in value.split(":") if part]


@pytest.mark.parametrize("value", [".", ":.", "{here}:", "/opt:{here}"])
def test_a_folder_that_is_named_stays(here: Path, value: str) -> None:
    value = value.format(here=here)
    assert not forgotten(here, value)
    assert os.environ["PYTHONPATH"] == value.strip(":")


def test_where_cloister_is_taken_from_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in ("common", "server", "client"):
        folder = COMMON.with_name(side)
        monkeypatch.chdir(folder)
        assert not forgotten(folder, ":")


def test_without_the_variable_nothing_changes(here: Path) -> None:
    for value in (None, ""):
        os.environ.pop("PYTHONPATH", None)
        if value is not None:
            os.environ["PYTHONPATH"] = value
        sys.path.insert(0, str(here))
        before = list(sys.path)
        forget_working_folder()
        assert sys.path == before


def test_a_working_folder_that_is_gone_is_no_error(here: Path) -> None:
    (here / "gone").mkdir()
    os.chdir(here / "gone")
    (here / "gone").rmdir()
    os.environ["PYTHONPATH"] = ":/opt"
    forget_working_folder()
    assert os.environ["PYTHONPATH"] == "/opt"


def test_a_child_gets_no_empty_part_and_no_empty_entry(here: Path) -> None:
    assert environment(base={"PYTHONPATH": ":/opt::a", "A": "1"})["PYTHONPATH"] == "/opt:a"
    assert "PYTHONPATH" not in environment(base={"PYTHONPATH": ":"})
    assert "PYTHONPATH" not in environment(base={"A": "1"})
    sys.path[:] = ["", "/opt", "a"]
    assert path_of_children() == ["/opt", str(here / "a")]
