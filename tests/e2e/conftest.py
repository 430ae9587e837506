"""Federations of real processes, for all tests that leave them as they found them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cloister_fl.simulation.synthetic_hospitals import HOSPITALS, Hospital
from cloister_fl.simulation.synthetic_sites import draw_federation
from support import coordinator_process
from support.coordinator_process import Running
from support.deployment import Deployment, deployed

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
    return _draw(tmp_path_factory, HOSPITALS)


@pytest.fixture(scope="session")
def three_drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``drawn``, of as few hospitals as can hide their updates in a sum."""
    return _draw(tmp_path_factory, HOSPITALS[:3])


@pytest.fixture(scope="session")
def federation(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and five hospitals that serve."""
    yield from _deploy(drawn, tmp_path_factory)


@pytest.fixture(scope="session")
def three(three_drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and three hospitals, for what every change must show to work."""
    yield from _deploy(three_drawn, tmp_path_factory)


def _draw(factory: pytest.TempPathFactory, hospitals: Sequence[Hospital]) -> Path:
    folder = factory.mktemp("data") / "drawn"
    small = [replace(hospital, patients=24, prevalence=0.5) for hospital in hospitals]
    draw_federation(folder, seed=5, hospitals=small, holdout_patients=20)
    return folder


def _deploy(drawn: Path, factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    sites = {path.name: path for path in sorted((drawn / "sites").iterdir())}
    with deployed(factory.mktemp("federation"), sites, policy=POLICY) as made:
        yield made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator's server, without hospitals."""
    folder = tmp_path_factory.mktemp("federation")
    server = coordinator_process.start(
        coordinator_process.new_coordinator(folder / "fed"), folder / "output"
    )
    yield server
    server.stop()
