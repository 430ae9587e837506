"""scripts/environment: its calls, of an interpreter that only writes down its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERPRETER = """#!/bin/bash
echo "$*${PYTHONPATH+ PYTHONPATH is set}" >> "$(dirname "$0")/calls"
case "$*" in
  *"-m pip --version"*) exit "${PIP_MISSING:-0}" ;;
  *uninstall*) rm -rf "$(dirname "$0")"/../lib/python3.11/site-packages/cloister-*.dist-info ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in a folder whose name has a space, with a `.venv` that exists."""
    root = tmp_path / "a checkout"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt", "constraints-torch.txt"):
        shutil.copy(ROOT / name, root)
    python = root / ".venv" / "bin" / "python"
    python.write_text(INTERPRETER)
    python.chmod(0o755)
    return root


def use(root: Path, **variables: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The calls of the interpreter while the environment is made ready, and how that ended."""
    calls = root / ".venv" / "bin" / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", 'set -euo pipefail; source "$1/scripts/environment"; use_environment client',
         "bash", str(root)],
        capture_output=True, text=True, check=False, env={**os.environ, **variables},
    )  # fmt: skip
    return (calls.read_text().splitlines() if calls.exists() else []), done


def test_every_call_ignores_the_working_folder(checkout: Path) -> None:
    """A ``pip`` or ``torch.py`` that lies where somebody stands would be run without -P."""
    calls, done = use(checkout, PYTHONPATH=":/nowhere")
    assert done.returncode == 0, done.stderr
    assert any(" install " in call for call in calls)
    assert [call for call in calls if not call.startswith("-P ") or "PYTHONPATH" in call] == []


def test_what_is_installed_is_not_installed_again(checkout: Path) -> None:
    use(checkout)
    assert use(checkout)[0] == []


def test_a_foreign_distribution_that_came_later_is_removed(checkout: Path) -> None:
    """One ``pip install`` by name brings another project's command ``cloister``."""
    use(checkout)
    foreign = (
        checkout / ".venv" / "lib" / "python3.11" / "site-packages" / "cloister-0.2.1.dist-info"
    )
    foreign.mkdir()
    calls, done = use(checkout)
    assert done.returncode == 0, done.stderr
    assert any("uninstall" in call and call.endswith(" cloister") for call in calls)
    assert any(" install " in call for call in calls)
    assert use(checkout)[0] == []


def test_a_half_made_environment_says_what_to_do(checkout: Path) -> None:
    calls, done = use(checkout, PIP_MISSING="1")
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert f"rm -r '{checkout}/.venv'" in done.stderr
    assert not any(" install " in call for call in calls)


def test_cdpath_does_not_mislead_it(checkout: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", 'source scripts/environment; echo "$root"'],
        cwd=checkout,
        env={**os.environ, "CDPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{checkout}\n"


@pytest.mark.parametrize(
    ("words", "all_of_them"),
    [
        (["-k", "roster"], False),
        (["-x", "--lf"], False),
        (["-k", "tests"], False),  # a word that happens to be a folder
        (["--ignore", "tests/e2e", "-q"], False),
        (["--ignore=tests/e2e"], False),
        (["tests/e2e"], True),
        (["-x", "tests/e2e", "-k", "roster"], True),
        (["-q", "tests/e2e/test_kills.py::test_one[a b]"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_alone_leave_out_the_slow_tests(
    checkout: Path, words: list[str], all_of_them: bool
) -> None:
    """``scripts/test -k WORD`` took the slow tests in, which last half an hour."""
    (checkout / "tests" / "e2e").mkdir(parents=True)
    (checkout / "tests" / "e2e" / "test_kills.py").touch()
    shutil.copy(checkout / ".venv" / "bin" / "python", checkout / ".venv" / "bin" / "hadolint")
    calls = checkout / ".venv" / "bin" / "calls"
    use(checkout)
    done = subprocess.run(
        [checkout / "scripts" / "test", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    marks = "" if all_of_them else "-m not slow "
    assert calls.read_text().splitlines()[-1] == f"-m pytest {marks}{' '.join(words)}"
