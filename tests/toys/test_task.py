"""The toy of docs/guides/add-a-task.md: a study names it, and a federation trains it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.predict import predict
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import StudyInvalid
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from cloister_fl.tasks import KINDS
from support.dicom import write_dicom
from support.federations import NAMES, picture, study
from support.task_conformance import check_task
from toys.severity import Severity, SeverityTarget

TARGET = {"kind": "severity", "column": "grade", "highest": 4, "severe": 2, "classes": None}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands in the product's table."""
    monkeypatch.setitem(KINDS, "severity", SeverityTarget)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grades") / "sites"
    for seed, name in enumerate(NAMES):
        write_graded(root / name, np.random.default_rng(seed), name)
    return root


def write_graded(folder: Path, rng: np.random.Generator, name: str) -> None:
    rows = ["PatientID,grade"]
    for number in range(30):
        rows.append(f"{name}-{number},{number % 5}")
        image = picture(rng, int(number % 5 >= 2))
        write_dicom(
            folder / "dicom" / f"{number}.dcm", image, patient_id=f"{name}-{number}", bits_stored=12
        )
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def asked(*, private: bool) -> Study:
    return study(
        target=TARGET,
        training={"rounds": 8, "learning_rate": 2.0},
        privacy={"enabled": private, "epsilon": 6.0},
        evaluation={"release_epsilon": 1.0, "site_fraction": 0.4} if private else {},
    )


def test_it_keeps_the_promises_of_a_task() -> None:
    check_task(Severity("grade", 4, 2))


def test_the_product_does_not_offer_it() -> None:
    with pytest.raises(StudyInvalid, match="is no kind of task"):
        asked(private=False)


@pytest.mark.usefixtures("added")
def test_a_grade_that_is_none_is_told_by_its_line(tmp_path: Path) -> None:
    site = init_site(tmp_path, name="anker", policy=Policy(patients_at_most=1_000, min_patients=1))
    write_graded(tmp_path, np.random.default_rng(0), "anker")
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace("anker-3,3", "anker-3,9"))
    (fault,) = read_cohort(site, asked(private=False)).faults
    assert "Line 5 has a grade that is out of range." in str(fault)
    assert "A grade is a whole number from 0 to 4." in str(fault)


@pytest.mark.usefixtures("added")
def test_a_federation_trains_and_predicts_it(sites: Path, tmp_path: Path) -> None:
    summary = run_simulation(Simulation(asked(private=False), sites, tmp_path / "run"))
    assert float(str(summary["auroc_final"])) > 0.9
    assert "Of a severe and another patient" in (tmp_path / "run" / "report.html").read_text()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(rows[-1])["metrics"]["class_counts"]) > 0
    out = tmp_path / "scores.csv"
    predict(tmp_path / "run" / "model.safetensors", sites / NAMES[0] / "dicom", out)
    with out.open() as file:
        told = list(csv.DictReader(file))
    assert len(told) == 30
    assert all(0 <= float(row["grade_as_a_share"]) <= 1 for row in told)


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_privately_its_counts_leave_noised_and_once(sites: Path, tmp_path: Path) -> None:
    summary = run_simulation(Simulation(asked(private=True), sites, tmp_path / "run"))
    assert summary["metrics_final"] is None
    assert summary["release"]["epsilon"] == 1.0  # type: ignore[index]
    assert 0 < float(str(summary["epsilon_max"])) <= 6.0
