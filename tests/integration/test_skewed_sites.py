"""A federation whose hospitals have one class each learns what an even one learns."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.simulation.result import read_result
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.dicom import write_dicom
from support.federations import NAMES, picture, study, write_cohort

PATIENTS = 40
CLASSES = ("no", "yes")


def _sites(root: Path, pool: Path, *, skewed: bool) -> Path:
    """The patients of ``pool``, in five hospitals; skewed, the first two have one class each."""
    with (pool / "labels.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    at = head.index("finding")
    by_class = {name: [row for row in rows if row[at] == name] for name in CLASSES}
    if skewed:
        shares = [
            [*by_class["no"][:PATIENTS]],
            [*by_class["yes"][:PATIENTS]],
            *(
                [*by_class["no"][start : start + 20], *by_class["yes"][start : start + 20]]
                for start in (40, 60, 80)
            ),
        ]
    else:
        shares = [
            [*by_class["no"][start : start + 20], *by_class["yes"][start : start + 20]]
            for start in (0, 20, 40, 60, 80)
        ]
    for name, share in zip(NAMES, shares, strict=True):
        folder = root / name
        for row in share:
            number = row[head.index("PatientID")].rpartition("-")[2]
            shutil.copytree(pool / "dicom" / number, folder / "dicom" / number)
        with (folder / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *share])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["epsilon = 6.0", "enabled = false"])
def test_two_sites_of_one_class_each_cost_little(tmp_path: Path, privacy: str) -> None:
    pool = tmp_path / "pool"
    write_cohort(pool, np.random.default_rng(5), "MRN", patients=5 * PATIENTS)
    write_cohort(tmp_path / "holdout", np.random.default_rng(99), "HOLD", patients=100)
    asked = study(privacy=privacy, training="rounds = 6")
    found = []
    for skewed in (False, True):
        sites = _sites(tmp_path / f"sites-{skewed}", pool, skewed=skewed)
        summary = run_simulation(
            Simulation(asked, sites, tmp_path / f"run-{skewed}", holdout=tmp_path / "holdout")
        )
        assert summary["sites"] == 5
        assert summary["secure_aggregation"] is True
        found.append(float(str(summary["auroc_final"])))
    even, odd = found
    assert even > 0.8
    assert abs(even - odd) <= 0.05


def _rare(folder: Path, rng: np.random.Generator, name: str, patients: int) -> Path:
    """A cohort in which one patient of twelve has the finding."""
    rows = ["PatientID,finding"]
    for number in range(patients):
        label = int(number % 12 == 0)
        patient = f"{name}-{number:03d}"
        rows.append(f"{patient},{CLASSES[label]}")
        path = folder / "dicom" / f"{number:03d}" / "0.dcm"
        write_dicom(path, picture(rng, label), patient_id=patient, bits_stored=12)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.slow
def test_class_weights_let_a_rare_class_be_called_with_privacy_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in NAMES:
        _rare(tmp_path / "sites" / name, rng, name, 50)
    holdout = _rare(tmp_path / "holdout", rng, "HOLD", 150)
    found = []
    for weights in ({}, {"no": 1.0, "yes": 11.0}):
        training = {"rounds": 10, "steps": 3, "learning_rate": 2.0, "class_weights": weights}
        asked = study(training=training, privacy="epsilon = 100.0")
        out = tmp_path / f"run-{len(found)}"
        run_simulation(Simulation(asked, tmp_path / "sites", out, holdout=holdout))
        found.append(read_result(out))
    # Eight of a hundred: nearly nobody scores 0.5, and all are called healthy.
    called = [
        np.mean([one.metrics.balanced_accuracy.value for one in result.rounds[4:]])
        for result in found
    ]
    assert called[0] < 0.7
    assert called[1] > max(0.6, called[0] + 0.1)
    delivered = found[1].metrics
    assert delivered.balanced_accuracy.value > 0.6
    assert found[0].model.read_bytes() != found[1].model.read_bytes()
