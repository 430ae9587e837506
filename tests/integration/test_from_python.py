"""Simulations as notebooks and scripts run them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cloister_fl.client.app
from cloister_fl.cli import main
from cloister_fl.client.predict import predict
from cloister_fl.errors import (
    CloisterError,
    FileUnreadable,
    NothingToResume,
    OptionInvalid,
    OutputInTheWay,
    TooFewSites,
    TooFewSitesGiven,
)
from cloister_fl.model_file import load_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.simulation import Progress, Result, from_python, read_result, simulate
from cloister_fl.study import load
from support.errors import raises
from support.federations import NAMES, study, study_text, write_cohort, write_federation
from support.host_state import changes_of, differences, state
from support.notebooks import run_notebook

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = {"enabled": False}
SHORT = {"rounds": 2, "steps": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites, a hold-out and the file of a short study of them."""
    root = tmp_path_factory.mktemp("federation")
    write_federation(root / "sites")
    write_cohort(root / "holdout", np.random.default_rng(99), "HOLD", patients=20)
    (root / "study.toml").write_text(study_text(training=SHORT))
    return root


def program(folders: Path, *more: str) -> str:
    """A program that simulates into the folder ``run``."""
    given = ", ".join(("study", f"{str(folders / 'sites')!r}", "'run'", *more))
    return (
        "from cloister_fl.simulation import simulate\n"
        "from cloister_fl.study import load\n"
        f"study = load({str(folders / 'study.toml')!r})\n"
        f"run = simulate({given})\n"
    )


def weights(run: Result) -> list[float]:
    """The trained model."""
    module, _ = load_model(run.model)
    return flatten(module).tolist()


# Figures and progress


def test_a_whole_study_from_the_file_to_scores(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Progress] = []
    run = simulate(
        load(folders / "study.toml"),
        str(folders / "sites"),
        str(tmp_path / "run"),
        holdout=str(folders / "holdout"),
        progress=told.append,
    )
    assert [(each.step, each.done, each.total) for each in told] == [
        ("Training rounds", 0, 2),
        ("Training rounds", 1, 2),
        ("Training rounds", 2, 2),
    ]
    assert tuple(each.round for each in told) == run.rounds
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run.summary == summary
    assert run.headline is not None
    assert [run.headline.value, run.headline.low, run.headline.high] == [
        summary["auroc_final"],
        *summary["auroc_final_interval"],
    ]
    assert run.epsilon == summary["epsilon_max"]
    assert 5.5 < summary["epsilon_max"] <= 6.0
    assert run == read_result(tmp_path / "run")
    scored = predict(str(run.model), str(folders / "holdout"), str(tmp_path / "scores.csv"))
    assert (scored.images, scored.masks) == (20, False)
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0].startswith("SOPInstanceUID,file,patient,score_no,score_yes,")
    assert len(lines) == 21
    # Nobody looks at a terminal here, and nothing is left to say.
    assert capfd.readouterr() == ("", "")


def test_it_is_the_run_of_the_command(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without privacy, two runs are the same to the bit: so there is no second way."""
    file = tmp_path / "open.toml"
    file.write_text(study_text(training=SHORT, privacy=OPEN))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(
            ["simulate", "open.toml", "--sites", str(folders / "sites"), "--out", "one", "--json"]
        )
    assert ended.value.code == 0
    run = simulate(load(file), folders / "sites", "two", progress=False)
    assert weights(read_result("one")) == weights(run)
    changing = {"run", "seconds", "bytes_sent_per_site"}
    first = read_result("one").summary
    assert {key: value for key, value in first.items() if key not in changing} == {
        key: value for key, value in run.summary.items() if key not in changing
    }


def test_the_command_hands_all_that_it_is_given_to_simulate(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}
    finished = simulate(
        study(training=SHORT, privacy=OPEN), folders / "sites", tmp_path / "run", progress=False
    )

    def noted(*arguments: Any, **options: Any) -> Any:
        given.update(options, arguments=arguments)
        return finished

    monkeypatch.setattr(from_python, "simulate", noted)
    words = [
        "--sites",
        "a",
        "--out",
        "b",
        "--holdout",
        "c",
        "--engine",
        "ray",
        "--resume",
        "--json",
    ]
    with pytest.raises(SystemExit) as ended:
        main.main(["simulate", str(folders / "study.toml"), *words])
    assert ended.value.code == 0
    assert given == {
        "arguments": (load(folders / "study.toml"), Path("a"), Path("b")),
        "holdout": Path("c"),
        "engine": "ray",
        "resume": True,
        "progress": False,
        "signatures": b"",
    }
    assert json.loads(capsys.readouterr().out) == finished.summary


@pytest.mark.slow
def test_what_a_callback_raises_ends_the_run_which_can_be_resumed(
    folders: Path, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise ZeroDivisionError("enough")

    asked = study(training={"rounds": 3, "steps": 1})
    with pytest.raises(ZeroDivisionError, match="enough"):
        simulate(asked, folders / "sites", tmp_path / "run", progress=stop)
    # At once, and not at the end.
    with raises(FileUnreadable):
        read_result(tmp_path / "run")
    run = simulate(asked, folders / "sites", tmp_path / "run", resume=True, progress=False)
    assert [each.number for each in run.rounds] == [0, 1, 2, 3]
    assert run.summary["rounds_lost"] == []


# Errors


def test_errors_have_a_code_a_message_and_a_remedy_and_nothing_is_printed(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = load(folders / "study.toml")
    sites = folders / "sites"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run"
    attempts: list[tuple[Any, Callable[[], object]]] = [
        (OptionInvalid, lambda: simulate(asked, sites, out, engine="rays")),  # type: ignore[arg-type]
        (OptionInvalid, lambda: simulate(asked, sites, out, threads=0)),
        (OptionInvalid, lambda: simulate(asked, sites, out, holdout=tmp_path / "no")),
        (OutputInTheWay, lambda: simulate(asked, sites, tmp_path / "full")),
        (TooFewSitesGiven, lambda: simulate(asked, tmp_path / "empty", out)),
        (NothingToResume, lambda: simulate(asked, sites, out, resume=True)),
    ]
    for kind, attempt in attempts:
        with raises(kind) as caught:
            attempt()
        error = caught.value
        assert isinstance(error, CloisterError)
        assert error.code.startswith("CLO-")
        assert error.what.endswith(".")
        assert error.remedy.endswith(".")
        assert error.__cause__ is None
    assert not out.exists()
    assert capfd.readouterr() == ("", "")


def test_a_site_that_refuses_gives_its_own_reason(folders: Path, tmp_path: Path) -> None:
    write_federation(tmp_path / "sites")
    (tmp_path / "sites" / "dorn" / "labels.csv").write_text("PatientID,finding\n")
    with pytest.raises(TooFewSites, match=r"dorn: CLO-20") as caught:
        simulate(load(folders / "study.toml"), tmp_path / "sites", tmp_path / "run")
    assert caught.value.code == "CLO-501"


def test_a_missing_package_is_told_with_its_command(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cloister_fl.system.optional.find_spec", lambda name: None if name == "opacus" else object()
    )
    with pytest.raises(CloisterError, match=r"CLO-601: .*opacus.* simulation"):
        simulate(load(folders / "study.toml"), folders / "sites", tmp_path / "run")


# What is left behind

HOST = """
import logging, os, random, signal, sys
import flwr.app, matplotlib, numpy, pydicom, torch
logging.basicConfig(level=logging.INFO)
logging.getLogger("flwr").setLevel(logging.WARNING)
logging.getLogger("pydicom").addHandler(logging.StreamHandler())
random.seed(1)
numpy.random.seed(2)
torch.manual_seed(3)
torch.set_num_threads(2)
os.environ["FLWR_TELEMETRY_ENABLED"] = "1"
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
    signal.signal(number, lambda *_: None)
sys.excepthook = lambda *_: None
"""
"""A program that has set up what it uses, and has used it."""

READERS = {"threads", "children"}
"""Processes that read DICOM wait for 20 seconds for more, and then end by themselves."""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", HOST], ids=["fresh", "host"])
def test_nothing_of_the_calling_program_is_changed(
    folders: Path, tmp_path: Path, first: str
) -> None:
    code = (
        program(folders, f"holdout={str(folders / 'holdout')!r}", "threads=1")
        + "from cloister_fl.client.predict import predict\n"
        f"predict(run.model, {str(folders / 'holdout')!r}, 'scores.csv')\n"
        "try:\n"
        "    simulate(study, 'nowhere', 'other')\n"
        "except Exception as error:\n"
        "    assert error.code == 'CLO-103', error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    changes = changes_of(code, first=first, folder=tmp_path)
    readers = {name: changes.pop(name, [[], []])[1] for name in READERS}
    assert changes == {}
    assert set(readers["threads"]) <= {"MainThread", "dicom-reader"}
    assert all("cloister_fl.client.dicom.sandbox.worker" in line for line in readers["children"])


@pytest.mark.slow
def test_a_prediction_alone_changes_nothing_either(folders: Path, tmp_path: Path) -> None:
    asked = study(training=SHORT, privacy=OPEN)
    run = simulate(asked, folders / "sites", tmp_path / "run", progress=False)
    code = (
        "from cloister_fl.client.predict import predict\n"
        f"predict({str(run.model)!r}, {str(folders / 'holdout')!r}, 'scores.csv')\n"
    )
    assert set(changes_of(code, folder=tmp_path)) <= READERS
    assert (tmp_path / "scores.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", HOST + "import ray"], ids=["fresh", "host"])
def test_nothing_is_changed_with_ray_either_and_it_keeps_to_itself(
    folders: Path, tmp_path: Path, first: str
) -> None:
    watched = (
        "from support.host_state import beyond_loopback, listening\n"
        "there, opened, sent = listening(), set(), set()\n"
        "def told(progress):\n"
        "    opened.update(listening() - there)\n"
        "    sent.add(sys.modules['flwr.supercore.telemetry'].FLWR_TELEMETRY_ENABLED)\n"
    )
    checked = "assert opened and not beyond_loopback(opened), opened\nassert sent == {'0'}, sent\n"
    code = "import sys\n" + watched + program(folders, "engine='ray'", "progress=told") + checked
    changes = changes_of(code, first=first, folder=tmp_path)
    # Ray needs its own packages on the module path, and keeps a thread.
    assert set(changes) <= {"module path", *READERS}
    paths = changes.get("module path", [[], ["added"]])
    assert paths[1][1:] == paths[0]


@pytest.mark.slow
def test_nothing_is_changed_by_drawing_images(tmp_path: Path) -> None:
    code = "from cloister_fl.simulation import generate_sites\ngenerate_sites('drawn')"
    assert changes_of(code, first=HOST, folder=tmp_path) == {}


@pytest.mark.slow
def test_the_threads_of_torch_are_those_that_were_asked_for(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = cloister_fl.client.app.train_round, set()

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.add(torch.get_num_threads())
        return real(*arguments, **options)

    monkeypatch.setattr(cloister_fl.client.app, "train_round", noted)
    asked = study(training=SHORT, privacy=OPEN)
    before = torch.get_num_threads()
    simulate(asked, folders / "sites", tmp_path / "three", threads=3)
    assert (seen, torch.get_num_threads()) == ({3}, before)
    seen.clear()
    simulate(asked, folders / "sites", tmp_path / "as-it-was")
    assert (seen, torch.get_num_threads()) == ({before}, before)


# Where it runs


@pytest.mark.slow
def test_it_runs_under_an_event_loop(folders: Path, tmp_path: Path) -> None:
    async def cell() -> float | None:
        return simulate(study(training=SHORT), folders / "sites", tmp_path / "run").epsilon

    epsilon = asyncio.run(cell())
    assert epsilon is not None
    assert 5.5 < epsilon <= 6.0


@pytest.mark.slow
def test_two_threads_take_turns(folders: Path, tmp_path: Path) -> None:
    asked = study(training=SHORT, privacy=OPEN)
    order: list[str] = []
    results: dict[str, list[float]] = {}

    def act(name: str) -> None:
        out = tmp_path / name
        results[name] = weights(
            simulate(asked, folders / "sites", out, progress=lambda _: order.append(name))
        )

    threads = [threading.Thread(target=act, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["one", "two"]
    assert order in (["one"] * 3 + ["two"] * 3, ["two"] * 3 + ["one"] * 3)
    # Each has the result that it would have alone.
    alone = weights(simulate(asked, folders / "sites", tmp_path / "alone"))
    assert results == {"one": alone, "two": alone}


@pytest.mark.slow
def test_a_notebook_runs_it_and_shows_a_bar(folders: Path, tmp_path: Path) -> None:
    cells = [
        program(folders, "threads=1"),
        "import asyncio\n"
        "from cloister_fl.simulation import read_result\n"
        "assert asyncio.get_running_loop().is_running()\n"
        "print(run == read_result('run'))",
        "simulate(study, 'nowhere', 'other')",
    ]
    cells[2] = f"try:\n    {cells[2]}\nexcept Exception as error:\n    print(error.code)"
    first, second, third = run_notebook(cells, folder=tmp_path, seconds=400)
    assert [one["output_type"] for one in first] == ["display_data"]
    # A bar is redrawn in its place: what is left is the last of it.
    assert first[0]["data"]["text/plain"].startswith("Training rounds: 2 of 2 (round 2: epsilon ")
    assert first[0]["data"]["text/html"].startswith('<progress value="2" max="2"></progress>')
    assert second[0]["text"] == "True\n"
    assert third[0]["text"] == "CLO-103\n"


# Interrupts


def interrupting(monkeypatch: pytest.MonkeyPatch, where: str, at: int) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, where a function is called for the n-th time."""
    real = pkgutil.resolve_name(where)
    calls = itertools.count(1)

    def act(*given: Any, **named: Any) -> Any:
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return real(*given, **named)

    monkeypatch.setattr(where, act)


@pytest.mark.parametrize(
    ("where", "at", "began", "lost"),
    [
        # While a site reads its images: nothing was trained.
        pytest.param(
            "cloister_fl.client.dicom.read_ahead.Reader._end", 30, False, [], marks=pytest.mark.slow
        ),
        # While the third site trains in round 1, and the first in round 2.
        pytest.param("cloister_fl.client.app.train_round", 3, True, [1], marks=pytest.mark.slow),
        ("cloister_fl.client.app.train_round", 6, True, [2]),
        # While the figures of the run are written.
        pytest.param(
            "cloister_fl.server.results.artifacts.write_report",
            1,
            True,
            [],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupt_ends_it_and_it_can_be_resumed_in_the_same_process(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    at: int,
    began: bool,
    lost: list[int],
) -> None:
    asked = study(training={"rounds": 3, "steps": 1})
    out = tmp_path / "run"
    interrupting(monkeypatch, where, at)
    before = state()
    # A notebook keeps the last exception, and with it every frame of the run.
    with pytest.raises(KeyboardInterrupt) as kept:
        simulate(asked, folders / "sites", out, progress=False)
    left = differences(before, state())
    assert set(left) <= READERS
    assert (out / "checkpoint" / "state.safetensors").is_file() is began
    run = simulate(asked, folders / "sites", out, resume=began, progress=False)
    assert run.summary["rounds_lost"] == lost
    assert run.epsilon is not None
    assert run.epsilon <= 6.0
    assert set(run.summary["site_names"]) == set(NAMES)
    del kept


@pytest.mark.slow
def test_an_interrupt_gives_torch_its_threads_back(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large network trains a patient a core, and torch has one thread meanwhile."""
    interrupting(monkeypatch, "cloister_fl.client.training.exact_sum._GridSum.add", 3)
    asked = study(training=SHORT, network={"arguments": {"width": 64}})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # Kept, and with it the frames of the run: nothing puts the number back by itself.
        with pytest.raises(KeyboardInterrupt) as kept:
            simulate(asked, folders / "sites", tmp_path / "run", progress=False)
        assert torch.get_num_threads() == 2
        del kept
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_ends_a_run_on_ray_and_its_threads(folders: Path, tmp_path: Path) -> None:
    asked = study(training={"rounds": 4, "steps": 1})
    before = set(threading.enumerate())

    def told(progress: Progress) -> None:
        if progress.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        simulate(asked, folders / "sites", tmp_path / "run", engine="ray", progress=told)
    left = {thread.name for thread in set(threading.enumerate()) - before if not thread.daemon}
    assert left == set()
    run = simulate(asked, folders / "sites", tmp_path / "run", resume=True, progress=False)
    assert run.summary["rounds"] == 4
    gc.collect()  # Ray leaves files open; their warnings belong to this test


@pytest.mark.slow
def test_ctrl_c_ends_a_script_that_resumes_afterwards(folders: Path, tmp_path: Path) -> None:
    """The signal itself, to all processes of the terminal, as a terminal and a kernel send it."""
    code = program(folders).replace("run = simulate(", "more = (") + (
        "def told(progress):\n"
        "    print(progress.done, flush=True)\n"
        "try:\n"
        "    simulate(*more, progress=told)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
        "print(simulate(*more, resume=True, threads=1), flush=True)\n"
    )
    file = tmp_path / "many.toml"
    file.write_text(study_text(training={"rounds": 12, "steps": 4}))
    code = code.replace(str(folders / "study.toml"), str(file))
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "0\n"
        assert running.stdout.readline() == "1\n"
        os.killpg(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    lines = out.splitlines()
    assert lines[-2] == "interrupted", err
    assert lines[-1] == "not measured, epsilon 6.00, 12 rounds at 5 sites"
    assert err == ""
    assert running.returncode == 0
