"""The toys of docs/guides/add-a-network.md: one is trained with privacy, those that mix are not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from cloister_fl.cli.study_commands import app
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.local_training import train_round
from cloister_fl.errors import NetworkUnfit, RunError, StudyInvalid
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.flat_parameters import flatten, layout_of
from cloister_fl.networks.registry import REGISTRY
from cloister_fl.networks.spec import Entry
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for
from support import studies
from support.cohorts import cohort_of
from support.commands import invoke
from support.federations import NAMES, study, write_federation
from toys.grid_means import ENTRY, MIXING, NETWORK

TABLE = tomllib.loads(NETWORK)["network"]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys stand in the product's registry."""
    for entry in (ENTRY, *MIXING):
        monkeypatch.setitem(REGISTRY, entry.name, entry)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("grid-means") / "sites", patients=20, images=1)


def test_the_product_does_not_offer_it() -> None:
    with pytest.raises(StudyInvalid, match="There is no network 'grid-means'"):
        studies.study(network=TABLE)


@pytest.mark.usefixtures("added")
def test_study_check_accepts_it_and_judges_its_arguments(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f"{studies.study_text()}\n{NETWORK}")
    said = invoke(app, "check", file)
    assert said.exit_code == 0
    assert "  network    grid-means" in said.stdout
    file.write_text(f"{studies.study_text()}\n{NETWORK.replace('cells = 8', 'cells = 17')}")
    with pytest.raises(StudyInvalid, match="a whole number from 1 to 16"):
        invoke(app, "check", file)


@pytest.mark.usefixtures("added", "one_thread")
def test_it_is_built_from_the_study_alone_and_is_private() -> None:
    asked = studies.study(network=TABLE)
    module = build_for(asked)
    assert layout_of(module).size == 64 * 16 + 16 + 2 * 16 + 2 * 16 + 2
    assert np.array_equal(flatten(module), flatten(build_for(asked)))
    assert module(torch.zeros(3, 1, 32, 32)).shape == (3, 2)
    require_private(module, size=32)


@pytest.mark.usefixtures("added", "one_thread")
@pytest.mark.parametrize("engine", ["patients", "opacus"])
def test_a_private_step_trains_it(engine: str) -> None:
    asked = studies.study(
        network=TABLE,
        input={"size": 16},
        training={"expected_batch": 4, "learning_rate": 1.0, "engine": engine},
    )
    module = build_for(asked)
    moved = train_round(
        module,
        cohort_of([1, 2, 3, 1]),
        asked,
        noise_multiplier=1e-6,
        random=SecureRandom(),
        round_number=1,
        steps=1,
    )
    # Four clipped gradients of at most 1 each, divided by four; hardly any noise.
    assert moved.shape == flatten(module).shape
    assert 0.01 < np.linalg.norm(moved) <= 1.001


@pytest.mark.usefixtures("added", "one_thread")
@pytest.mark.parametrize("entry", MIXING, ids=lambda entry: entry.name)
def test_one_that_mixes_patients_is_refused(entry: Entry) -> None:
    # No layer is built to check a study, so the check of the study does not see it.
    asked = studies.study(network={**TABLE, "name": entry.name})
    says = "mixes the images of a batch" if "norm" in entry.name else "depends on another image"
    with pytest.raises(NetworkUnfit, match=says):
        require_private(build_for(asked), size=32)


def _spent(run: Path, asked: Study) -> list[float]:
    """What each site's ledger says that the study has spent, in epsilon."""
    spent = []
    for name in NAMES:
        site = open_site(run / "sites" / name)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        spent.append(ledger.epsilon_study(asked.digest, asked.privacy.delta))
    return spent


@pytest.mark.usefixtures("added")
def test_a_federation_trains_it_with_privacy(sites: Path, tmp_path: Path) -> None:
    asked = study(network={**TABLE, "arguments": {"cells": 8, "width": None}})
    summary = run_simulation(Simulation(asked, sites, tmp_path / "run"))
    assert summary["rounds"] == 3
    assert summary["secure_aggregation"] is True
    assert 5.5 < summary["epsilon_max"] <= 6.0
    assert all(5.5 < epsilon <= 6.0 for epsilon in _spent(tmp_path / "run", asked))


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("entry", MIXING, ids=lambda entry: entry.name)
def test_no_site_trains_one_that_mixes_and_no_patient_is_charged(
    sites: Path, tmp_path: Path, entry: Entry
) -> None:
    asked = study(network={"name": entry.name, "arguments": {"cells": 8, "width": None}})
    with pytest.raises(RunError) as caught:
        run_simulation(Simulation(asked, sites, tmp_path / "run"))
    assert str(caught.value).count("CLO-401") == len(NAMES)
    assert _spent(tmp_path / "run", asked) == [0.0] * len(NAMES)
