"""A run that a person ends with what it has: through processes, and with a kill between."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from cloister_fl.client.steward import budget
from cloister_fl.simulation.synthetic_hospitals import HOSPITALS
from cloister_fl.simulation.synthetic_sites import draw_federation
from cloister_fl.study.file import parse_study
from support.coordinator_process import wait_for
from support.deployment import children_of, cloister, deployed, study_text

POLICY = {
    "max_epsilon_study": "8.0",
    "max_epsilon_lifetime": "60.0",
    "colluders": "0",
    "min_sites": "3",
    "release_unstarted": "true",
}


@pytest.mark.slow
def test_a_run_is_ended_with_what_it_has_whatever_is_killed(tmp_path: Path) -> None:
    small = [replace(one, patients=24, prevalence=0.5) for one in HOSPITALS[:3]]
    drawn = draw_federation(tmp_path / "data", seed=5, hospitals=small, holdout_patients=20)
    data = {one.name: one for one in sorted((tmp_path / "data" / "sites").iterdir())}
    text = study_text(
        "kept",
        training={"rounds": 500, "sampling_rate": 0.2, "expected_batch": 5},
        privacy={"epsilon": 8.0},
        aggregation={"min_sites": 3, "colluders": 0},
    )
    base = tmp_path / "federation"
    base.mkdir()
    with deployed(base, data, policy=POLICY) as made:
        name = made.run(text, "--holdout", str(drawn.holdout.folder))
        stop = ("server", "stop", "--run", name, "--keep", "--dir", made.folder)
        cloister(*stop, status=6)
        made.approve(parse_study(text))
        wait_for(lambda: made.status(name).get("round", 0) >= 2, 400, made.told)
        cloister(*stop)
        # Killed where it writes its last files, or before: what was asked for outlives it.
        executor = children_of(made.server.process.pid).get("run_executor")
        if executor is not None:
            os.kill(executor, signal.SIGKILL)
        summary = made.wait_for_end(name)
        assert summary["ended"] == "kept"
        assert 2 <= summary["rounds"] < 500
        assert summary["model_round"] >= 1
        # The whole study's, for the end followed from what people saw.
        assert summary["epsilon_max"] == pytest.approx(8.0, abs=0.05)
        folder = made.folder / "runs" / name
        with safe_open(folder / "model.safetensors", framework="np") as file:
            facts = json.loads(file.metadata()["facts"])
        assert facts["round"] == summary["model_round"]
        for hospital in made.hospitals.values():
            wait_for(lambda at=hospital: budget.statement(at.site).studies[0].closed, 60, made.told)
            told = budget.statement(hospital.site)
            assert told.lifetime_promised == told.lifetime_spent
            assert told.studies[0].epsilon_planned == pytest.approx(8.0, abs=0.05)
            assert told.studies[0].rounds_started == summary["rounds"]
            assert "of 500 rounds started" in cloister("client", "budget", "--dir", hospital.folder)
        report = cloister("server", "report", name, "--dir", made.folder)
        assert "a person stopped it and kept what it had" in " ".join(report.split())
