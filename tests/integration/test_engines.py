"""Both engines run the same apps and give the same model, DP noise included when tests seed it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from cloister_fl.client.app import app
from cloister_fl.errors import TooFewSites
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import NAMES, study, write_federation
from support.host_state import beyond_loopback, listening
from support.seeded_noise import SeededClientApp


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("engines") / "sites")


def _weights(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["enabled = true", "enabled = false"])
@pytest.mark.filterwarnings("ignore")
def test_ray_and_in_process_give_the_same_model(sites: Path, tmp_path: Path, privacy: str) -> None:
    asked = study(privacy=privacy)
    models = {}
    before = listening()
    opened: set[str] = set()
    for engine in ("in-process", "ray"):
        out = tmp_path / engine
        summary = run_simulation(
            Simulation(asked, sites, out, engine),
            client_app=SeededClientApp(app),
            notify=lambda _: opened.update(listening() - before),
        )
        assert summary["site_names"] == list(NAMES)
        models[engine] = _weights(out)
    gc.collect()  # Ray leaves files open; their warnings belong to this test
    assert opened
    assert beyond_loopback(opened) == set()
    one, two = models["in-process"], models["ray"]
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_run_passes_through_ray(sites: Path, tmp_path: Path) -> None:
    write_federation(tmp_path / "sites")
    (tmp_path / "sites" / "dorn" / "labels.csv").write_text("PatientID,finding\n")
    with pytest.raises(TooFewSites, match=r"dorn: CLO-20"):
        run_simulation(Simulation(study(), tmp_path / "sites", tmp_path / "run", "ray"))
    gc.collect()


@pytest.mark.slow
def test_seeded_noise_repeats_only_under_the_tests_own_key_source(
    sites: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run_simulation(Simulation(study(), sites, tmp_path / name), client_app=SeededClientApp(app))
    run_simulation(Simulation(study(), sites, tmp_path / "real"))
    one, two, real = (_weights(tmp_path / name) for name in ("one", "two", "real"))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert any(not np.array_equal(one[key], real[key]) for key in one)
