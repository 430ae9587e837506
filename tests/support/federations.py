"""Small federations for tests: folders of sites with a learnable question, and their study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.loading import read_for_check
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.steward.approval import approve as look_and_approve
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support import studies
from support.dicom import write_dicom
from support.studies import Table

NAMES = ("anker", "birke", "clara", "dorn", "esche")

BRIGHT_HALF: Mapping[str, Table] = {
    "study": {"name": "bright-half", "question": "Is the upper half brighter than the lower?"},
    "input": {"size": 32, "modalities": ["DX"]},
    "target": {"column": "finding", "classes": ["no", "yes"]},
    "network": {"arguments": {"width": 4}},
    "training": {
        "rounds": 3,
        "steps": 2,
        "sampling_rate": 0.5,
        "expected_batch": 6,
        "learning_rate": 0.5,
        "seed": 11,
    },
    "privacy": {"epsilon": 6.0},
}


def study(**tables: Table) -> Study:
    """``BRIGHT_HALF`` with further tables; a key that is given replaces the one there."""
    return parse_study(study_text(**tables))


def study_text(**tables: Table) -> str:
    """The text of ``study(**tables)``, bound to its initial model."""
    return studies.bound_text(**studies.merged(BRIGHT_HALF, tables))


def with_engine(asked: Study, engine: str) -> Study:
    """The study with another engine, also one that a study file may not name."""
    training = asked.training.model_copy(update={"engine": engine})
    return asked.model_copy(update={"training": training})


def picture(rng: np.random.Generator, label: int) -> NDArray[np.uint16]:
    """A noisy 12-bit image whose upper half is brighter where ``label`` is 1."""
    pixels = rng.normal(2000, 200, (36, 32))
    pixels[:18] += 700 * (2 * label - 1)
    return np.clip(pixels, 0, 4095).astype(np.uint16)


def write_federation(
    root: Path,
    *,
    names: Sequence[str] = NAMES,
    patients: int = 20,
    images: int = 1,
    seed: int = 0,
    prefix: str = "MRN",
) -> Path:
    """Write a directory a site below ``root`` and return it."""
    rng = np.random.default_rng(seed)
    for name in names:
        write_cohort(root / name, rng, f"{prefix}-{name}", patients=patients, images=images)
    return root


def write_cohort(
    folder: Path, rng: np.random.Generator, prefix: str, *, patients: int = 20, images: int = 1
) -> Path:
    """Write ``dicom/`` and ``labels.csv`` of one site: every second patient has the finding."""
    rows = ["PatientID,finding"]
    for number in range(patients):
        patient = f"{prefix}-{number:03d}"
        rows.append(f"{patient},{('no', 'yes')[number % 2]}")
        for image in range(images):
            path = folder / "dicom" / f"{number:03d}" / f"{image}.dcm"
            write_dicom(path, picture(rng, number % 2), patient_id=patient, bits_stored=12)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


SEEN = "5" * 64
"""Data that a test's steward says to have looked at, where nobody did."""


def approve(folder: Path, asked: Study) -> None:
    """Approve a study at a site folder that a test wrote a ``site.toml`` for, as its steward: the
    data are looked at and frozen."""
    site = init_site(folder)
    look_and_approve(site, asked, read_for_check(site, asked))
