"""What README and docs show works as it stands there: Python is run, commands are at least read."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from cloister_fl.cli import main
from support.notebooks import run_notebook

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALONE = ["docs/api.md", "docs/secure-aggregation.md"]
"""Pages whose Python needs no file; that of docs/use-the-model.md runs in test_use_the_model.py."""
WITH_PYTHON = [*ALONE, "docs/use-the-model.md", "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FIGURE = r"[01]\.\d{3} \(0\.\d{3} to [01]\.\d{3}\)"
FIGURES = re.compile(
    rf"AUROC {_FIGURE}, average precision {_FIGURE}, balanced accuracy {_FIGURE}, "
    r"epsilon 7\.90, 8 rounds at 5 sites"
)
"""What the ten lines print, whatever the noise."""


def parsed(page: str) -> Document:
    """A page with its Python examples."""
    return Sybil([PythonCodeBlockParser()], encoding="utf-8").parse(ROOT / page)


def ten_lines() -> str:
    """The Python of the README."""
    found = [example.parsed for example in parsed("README.md").examples()]
    assert len(found) == 1
    return str(found[0])


def blocks() -> Iterator[tuple[str, str]]:
    """The blocks of shell lines: where, and the text."""
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text("utf-8")):
            if language in ("", "sh"):
                yield page.name, text


def commands() -> list[tuple[str, str]]:
    """Every line that runs ``cloister``, with the page it is on."""
    found = []
    for page, text in blocks():
        joined = re.sub(r"\\\n\s*", " ", text)
        for line in re.split(r"\n|&&", joined):
            words = line.strip().removeprefix(".venv/bin/")
            if words.startswith("cloister "):
                found.append((page, words))
    return found


# Python


def test_each_page_with_python_is_tested() -> None:
    pages = [str(page.relative_to(ROOT)) for page in PAGES]
    assert {page for page in pages if list(parsed(page).examples())} == set(WITH_PYTHON)


@pytest.mark.parametrize("page", ALONE)
def test_the_examples_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = list(parsed(page).examples())
    assert examples
    for example in examples:
        example.evaluate()


def test_the_readme_has_ten_lines() -> None:
    code = [line for line in ten_lines().splitlines() if line.strip() and line[0] != "#"]
    assert len(code) == 10
    shown = re.search(r"^print\(run\)\n((?:# .*\n)+)", ten_lines(), re.MULTILINE)
    assert shown
    assert FIGURES.fullmatch(shown[1].removeprefix("# ").strip().replace("\n# ", " "))


@pytest.mark.slow
def test_the_ten_lines_run_in_a_fresh_interpreter(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", ten_lines()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert 7.89 < float(lines[0]) <= 7.9
    assert FIGURES.fullmatch(lines[1])
    assert [line.partition(":")[0] for line in lines[2:]] == [
        *("before training", *(f"round {number}" for number in range(1, 9)))
    ]
    scores = (tmp_path / "scores.csv").read_text().splitlines()
    assert scores[0].startswith("SOPInstanceUID,file,patient,score_normal,score_nodule,")
    assert len(scores) > 240


@pytest.mark.slow
def test_the_ten_lines_run_in_a_notebook_and_show_their_progress(tmp_path: Path) -> None:
    outputs = run_notebook([ten_lines()], folder=tmp_path, seconds=900)[0]
    printed = "".join(one["text"] for one in outputs if one["output_type"] == "stream")
    assert FIGURES.search(printed)
    bars = [one["data"] for one in outputs if one["output_type"] == "display_data"]
    assert [bar["text/plain"].partition(" (")[0] for bar in bars] == [
        *("Drawing patients: 710 of 710", "Training rounds: 8 of 8")
    ]
    assert '<progress value="8" max="8">' in bars[1]["text/html"]
    assert (tmp_path / "scores.csv").is_file()


# Commands


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_a_command_that_is_shown_is_one_that_there_is(page: str, line: str) -> None:
    """With the options and as many arguments as the command takes; it is not run."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    ends = [place for place, word in enumerate(words) if word in ("|", "<", ">")]
    words = words[: ends[0]] if ends else words
    command: click.Command = main.build()
    context = None
    name = "cloister"
    with contextlib.ExitStack() as stack:
        while True:
            context = stack.enter_context(command.make_context(name, words, parent=context))
            if not isinstance(command, click.Group):
                return
            name, found, words = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            assert found is not None, page
            command = found


def test_many_commands_are_shown() -> None:
    assert len(commands()) > 30
    assert {page for page, _ in commands()} >= {"README.md", "deploy-hospital.md", "sources.md"}


def test_a_command_with_a_wrong_option_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        test_a_command_that_is_shown_is_one_that_there_is("x.md", "cloister study check --nonsense")
    with pytest.raises(click.UsageError):
        test_a_command_that_is_shown_is_one_that_there_is("x.md", "cloister study nonsense")


def test_the_quick_commands_of_the_readme_run(tmp_path: Path) -> None:
    quick = [
        line
        for page, line in commands()
        if page == "README.md" and line.startswith(("cloister study new", "cloister study check"))
    ]
    assert len(quick) == 2
    command = Path(sys.executable).with_name("cloister")
    for line in quick:
        words = shlex.split(line, comments=True)[1:]
        done = subprocess.run(
            [command, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "study.toml").is_file()


@pytest.mark.parametrize("study", sorted((ROOT / "docs" / "studies").glob("*.toml")))
def test_a_study_that_is_shown_is_sound(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["study", "check", str(study)])
    assert ended.value.code == 0, capsys.readouterr().err
