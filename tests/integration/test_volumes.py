"""A federation on series of CT: whole volumes, from files to a model that tells them apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.model_file import load_model
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support.ct_series import write_series
from support.federations import NAMES, study_text

INPUT = """\
size = 16
modalities = ["CT"]
windowing = "fixed"
window = [2048.0, 4096.0]
dimensions = 3
depth = 6
spacing = 2.0"""
NETWORK = 'name = "small-cnn-3d"\narguments = { width = 4 }'


def asked(**tables: str) -> Study:
    return parse_study(study_text(input=INPUT, network=NETWORK, **tables))


def write_volumes(folder: Path, rng: np.random.Generator, prefix: str, patients: int) -> None:
    """Every second patient is bright on top; a slice or a sum of all slices does not tell."""
    rows = ["PatientID,finding"]
    for number in range(patients):
        label, patient = number % 2, f"{prefix}-{number:03d}"
        rows.append(f"{patient},{('no', 'yes')[label]}")
        stored = rng.normal(2000, 200, (6, 16, 16))
        stored[:3] -= 700 * (2 * label - 1)
        stored[3:] += 700 * (2 * label - 1)
        write_series(
            folder / "dicom" / f"{number:03d}",
            np.clip(stored, 0, 4095).astype(np.uint16),
            patient=patient,
            step=2.0,
            order=[int(k) for k in rng.permutation(6)],
        )
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(4)
    for name in NAMES:
        write_volumes(root / "sites" / name, rng, name, 20)
    write_volumes(root / "holdout", rng, "hold", 20)
    return root


@pytest.mark.slow
def test_a_federation_learns_what_only_the_order_of_slices_tells(
    folders: Path, tmp_path: Path
) -> None:
    study = asked(privacy="enabled = false", training="rounds = 4\nsteps = 6\nlearning_rate = 0.1")
    summary = run_simulation(
        Simulation(study, folders / "sites", tmp_path / "run", holdout=folders / "holdout")
    )
    assert summary["auroc_initial"] < 0.8
    assert summary["auroc_final"] > 0.95
    _, travelled = load_model(tmp_path / "run" / "model.safetensors")
    assert travelled == study
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_private_federation_of_volumes(folders: Path, tmp_path: Path) -> None:
    study = asked(
        training="rounds = 1\nsteps = 1\naugment = true",
        evaluation="release_epsilon = 1.0",
    )
    summary = run_simulation(Simulation(study, folders / "sites", tmp_path / "run"))
    assert summary["sites"] == 5
    assert 4.5 < summary["epsilon_max"] <= 6.0
    module, _ = load_model(tmp_path / "run" / "model.safetensors")
    assert module.features[0].weight.shape == (4, 1, 3, 3, 3)
