"""Kill a real simulation and go on: what is lost is the round under way, and no budget returns."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cloister_fl.cli.main import main
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from support.federations import NAMES, approve, study, study_text, write_federation

pytestmark = pytest.mark.slow

ROUNDS = 6
STEPS = 12
TRAINING = f"rounds = {ROUNDS}\nsteps = {STEPS}"
PATIENCE = 60.0
"""Seconds to wait for a process to get somewhere; it takes a few."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federation")
    write_federation(root / "sites")
    (root / "study.toml").write_text(study_text(training=TRAINING), encoding="utf-8")
    return root


def _arguments(study_file: Path, sites: Path, out: Path, *more: str) -> list[str]:
    return ["simulate", str(study_file), "--sites", str(sites), "--out", str(out), *more]


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("CLOISTER_TRACEBACK", None)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cloister_fl.cli.main", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def _kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], log: Path) -> None:
    """Kill the process, as the kernel does when memory is short, once ``reached`` says so."""
    until = time.monotonic() + PATIENCE
    try:
        while not reached():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9


def _bodies(ledger: Path) -> list[dict[str, object]]:
    """The entries of a ledger in use: read without a lock that lasts, or nothing yet."""
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT body FROM entries ORDER BY seq").fetchall()
    except sqlite3.Error:
        return []
    return [json.loads(body) for (body,) in rows]


def _rounds_started(ledger: Path) -> list[int]:
    return [int(str(body["round"])) for body in _bodies(ledger) if "round" in body]


def _temporaries(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith((".tmp", "-journal"))]


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: str, status: int) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    assert ended.value.code == status
    assert told.err.startswith(f"{code}: ")
    assert "Traceback" not in told.out + told.err
    return told.err


def _ledger(out: Path, name: str) -> Ledger:
    site = open_site(out / "sites" / name)
    return Ledger.open(site.ledger, delta=site.policy.ledger_delta)


class Killed(NamedTuple):
    """A run that was killed: its folder, the round under way, and who had begun it."""

    out: Path
    round: int
    begun: dict[str, list[int]]


@pytest.fixture(scope="module")
def killed(folders: Path) -> Killed:
    out = folders / "run"
    log = folders / "killed.log"
    ledgers = {name: out / "sites" / name / "ledger.sqlite" for name in NAMES}

    def under_way() -> bool:
        # Third of five: with this some sites have begun the round, and some have not.
        return max(_rounds_started(ledgers[NAMES[2]]), default=0) >= 2

    process = _start(_arguments(folders / "study.toml", folders / "sites", out), log)
    _kill_when(process, under_way, log)
    progress = json.loads((out / "checkpoint" / "progress.json").read_text())
    begun = {
        # Through the product: it rolls a transaction back that the kill cut in two.
        name: [
            entry.body["round"] for entry in _ledger(out, name).entries() if entry.kind == "started"
        ]
        for name in NAMES
    }
    return Killed(out, int(progress["round"]), begun)


@pytest.fixture(scope="module")
def resumed(killed: Killed, folders: Path) -> dict[str, Any]:
    """The run in a copy of the killed folder, at its end; and its summary."""
    out = folders / "resumed"
    shutil.copytree(killed.out, out)
    log = folders / "resumed.log"
    arguments = _arguments(folders / "study.toml", folders / "sites", out, "--resume", "--json")
    process = _start(arguments, log)
    assert process.wait(PATIENCE) == 0, log.read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(log.read_text()) == summary
    return {**summary, "out": out}


def test_the_kill_fell_into_a_round(killed: Killed) -> None:
    assert 2 <= killed.round < ROUNDS
    begun = [name for name, rounds in killed.begun.items() if killed.round in rounds]
    assert begun
    assert begun == list(NAMES[: len(begun)])
    for rounds in killed.begun.values():
        assert rounds in ([*range(1, killed.round + 1)], [*range(1, killed.round)])
    assert not (killed.out / "summary.json").exists()


def test_a_killed_run_leaves_its_figures_and_a_model_that_can_be_used(killed: Killed) -> None:
    rows = [json.loads(line) for line in (killed.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(len(rows)))
    # The round under way may have been saved a moment before the kill.
    assert len(rows) in (killed.round, killed.round + 1)
    scores = killed.out.parent / "scores.csv"
    command = [sys.executable, "-m", "cloister_fl.cli.main", "predict"]
    data = killed.out.parent / "sites" / NAMES[0] / "dicom"
    told = subprocess.run(
        [*command, str(killed.out / "model.safetensors"), str(data), "--out", str(scores)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert len(scores.read_text().splitlines()) > 1


def test_a_killed_ledger_is_sound(killed: Killed) -> None:
    for name in NAMES:
        _ledger(killed.out, name).verify()


def test_the_lost_round_stays_charged_and_is_never_repeated(
    killed: Killed, resumed: dict[str, Any]
) -> None:
    asked = study(training=TRAINING)
    for name in NAMES:
        ledger = _ledger(resumed["out"], name)
        ledger.verify()
        kinds = Counter(entry.kind for entry in ledger.entries())
        assert set(kinds) == {"created", "reserved", "started", "epoch", "round", "answered"}
        assert kinds["reserved"] == 1
        started = [entry.body for entry in ledger.entries() if entry.kind == "started"]
        keys = [(body["run"], body["round"]) for body in started]
        assert len(set(keys)) == len(keys)
        rounds = [round_number for _, round_number in keys]
        assert rounds[: len(killed.begun[name])] == killed.begun[name]
        expected = set(range(1, ROUNDS + 1))
        if killed.round not in killed.begun[name]:
            expected.remove(killed.round)
        assert sorted(rounds) == sorted(expected)
        (held,) = ledger.reservations()
        assert held.started == STEPS * len(rounds) <= held.steps == STEPS * ROUNDS
        spent = ledger.epsilon_study(asked.digest, asked.privacy.delta)
        assert spent <= asked.privacy.epsilon
        # What the coordinator tells is what was sent out: never less than what is charged.
        told = resumed["epsilon_per_site"]
        assert spent <= told[name] + 1e-9 <= asked.privacy.epsilon + 1e-9


def test_the_summary_tells_what_was_lost(killed: Killed, resumed: dict[str, Any]) -> None:
    assert resumed["rounds_lost"] == [killed.round]
    assert resumed["rounds"] == ROUNDS
    assert resumed["site_names"] == list(NAMES)
    assert any("lost to a crash" in text for text in resumed["warnings"])
    out: Path = resumed["out"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [
        number for number in range(ROUNDS + 1) if number != killed.round
    ]


def test_nothing_half_written_is_left(resumed: dict[str, Any]) -> None:
    out: Path = resumed["out"]
    assert _temporaries(out) == []
    assert (out / "model.safetensors").is_file()
    assert (out / "report.html").is_file()


def test_a_changed_study_does_not_resume(
    killed: Killed, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed.out, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = tmp_path / "changed.toml"
    changed.write_text(study_text(training=TRAINING + "\nlearning_rate = 0.4"), encoding="utf-8")
    _fails(capsys, _arguments(changed, folders / "sites", out, "--resume"), "CLO-503", 6)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("exists", [True, False], ids=["empty", "absent"])
def test_an_empty_folder_does_not_resume(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    arguments = _arguments(folders / "study.toml", folders / "sites", out, "--resume")
    _fails(capsys, arguments, "CLO-504", 6)
    # Else the remedy, a run in this folder without --resume, would find it in use.
    assert out.exists() == exists
    assert not exists or list(out.iterdir()) == []


@pytest.mark.slow
def test_a_kill_before_the_first_round_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = write_federation(tmp_path / "sites")
    for name in NAMES:
        # The lifetime bears this study once: a second reservation would be refused.
        (sites / name / "site.toml").write_text(
            f'[site]\nname = "{name}"\n[policy]\npatients_at_most = 1000\n'
            "max_epsilon_study = 6\nmax_epsilon_lifetime = 9\n"
        )
    for name in NAMES:
        approve(sites / name, study())
    text = study_text()
    study_file = tmp_path / "study.toml"
    study_file.write_text(text, encoding="utf-8")
    ledger = sites / "anker" / "ledger.sqlite"
    log = tmp_path / "killed.log"
    process = _start(_arguments(study_file, sites, tmp_path / "one"), log)
    _kill_when(process, lambda: any("limit_study" in body for body in _bodies(ledger)), log)
    assert not (tmp_path / "one" / "checkpoint").exists(), "the kill came too late"
    assert not (tmp_path / "one" / "summary.json").exists()
    _fails(capsys, _arguments(study_file, sites, tmp_path / "one", "--resume"), "CLO-504", 6)

    main_arguments = _arguments(study_file, sites, tmp_path / "two", "--json")
    with pytest.raises(SystemExit) as ended:
        main(main_arguments)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["rounds_lost"] == []
    asked = study()
    for name in NAMES:
        site = open_site(sites / name)
        held = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        held.verify()
        (reservation,) = held.reservations()
        assert reservation.started == reservation.steps == asked.training.total_steps
        assert held.epsilon_study(asked.digest, asked.privacy.delta) <= asked.privacy.epsilon
