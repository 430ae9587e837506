"""Two processes and one folder: the second is told so, and leaves the first's files alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister_fl.errors import OutputInTheWay, RunStopped
from cloister_fl.server.rounds.events import Event
from cloister_fl.simulation import demo_data, generate_sites
from cloister_fl.simulation.run_folder import MARKER
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.errors import raises
from support.federations import study, write_federation

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]

HOLD = """
import sys, pathlib
from cloister_fl.system.pid_lock import only_one
with only_one(pathlib.Path(sys.argv[1]), RuntimeError):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(lock: Path) -> Iterator[int]:
    """Another process that holds a lock; yields its id."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("federation") / "sites")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_that_starts_is_not_taken_for_a_start_that_failed(
    sites: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "federation").mkdir(parents=True)
    (out / "federation" / "root.key").touch()
    (out / ".gitignore").touch()
    with held(out / MARKER) as process:
        before = files(out)
        with raises(OutputInTheWay, match=rf"is in use\. Process {process} works in it\."):
            run_simulation(Simulation(study(), sites, out))
        assert files(out) == before


@pytest.mark.slow
def test_a_run_is_resumed_by_one_process(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = study(training={"rounds": 2, "steps": 1})

    def stop() -> None:
        raise RunStopped("Enough.")

    with raises(RunStopped):
        run_simulation(Simulation(asked, sites, out), check=stop)
    with held(out / MARKER), raises(OutputInTheWay, match="is in use"):
        run_simulation(Simulation(asked, sites, out, resume=True))
    summary = run_simulation(Simulation(asked, sites, out, resume=True))
    assert summary["rounds"] == 2


@pytest.mark.slow
def test_the_folder_is_held_for_the_whole_run(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told: list[str] = []
    asked = study(training={"rounds": 1, "steps": 1})

    def again(_: Event) -> None:
        with raises(OutputInTheWay, match=rf"Process {os.getpid()} works in it") as caught:
            run_simulation(Simulation(asked, sites, out))
        told.append(str(caught.value))

    run_simulation(Simulation(asked, sites, out), notify=again)
    assert told
    with raises(OutputInTheWay, match="is not empty"):
        run_simulation(Simulation(asked, sites, out))


def test_one_process_draws_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    folder.mkdir()
    with held(folder / ".cloister-data") as process:
        with raises(OutputInTheWay, match=rf"is in use\. Process {process} works in it\."):
            generate_sites(folder, progress=False)
        assert files(folder) == {".cloister-data"}
    # What the other left without having drawn is no obstacle.
    with demo_data._claimed(folder):
        pass
