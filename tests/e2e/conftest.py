"""One federation of real processes, for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloister_server.hospitals import HOSPITALS, draw_federation
from deployment import Deployment, deployed

POLICY = {
    "max_epsilon_study": "8.0",
    "max_epsilon_lifetime": "100.0",
    "allow_without_privacy": "true",
    "colluders": "0",
    "min_sites": "3",
}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small hospitals and a hold-out, as DICOM folders."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    small = [replace(hospital, patients=24, prevalence=0.5) for hospital in HOSPITALS]
    draw_federation(folder, seed=5, hospitals=small, holdout_patients=20)
    return folder


@pytest.fixture(scope="session")
def federation(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and five hospitals that serve."""
    sites = {path.name: path for path in sorted((drawn / "sites").iterdir())}
    with deployed(tmp_path_factory.mktemp("federation"), sites, policy=POLICY) as made:
        yield made
