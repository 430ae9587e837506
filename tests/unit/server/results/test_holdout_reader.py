"""A hold-out that is not one: images that a site trains on are found, other files are not asked."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.holdout import read_holdout
from cloister_fl.errors import ExtraMissing, InternalError, OptionInvalid
from cloister_fl.server.cli import run_commands
from cloister_fl.server.results import holdout_reader as of_server
from cloister_fl.server.results.holdout_reader import GROUP, NAME, load_reader
from cloister_fl.simulation.holdout_overlap import refuse_overlap
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.system.installation import DISTRIBUTION, install_command
from support.coordinator_process import new_coordinator
from support.errors import raises
from support.federations import study, study_text, write_cohort, write_federation

pytestmark = pytest.mark.process


PYPROJECT = Path(__file__).resolve().parents[4] / "pyproject.toml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("holdout")
    write_federation(root / "sites", names=("anker", "birke"), patients=4)
    write_cohort(root / "holdout", np.random.default_rng(9), "HOLD", patients=4)
    return root


def _sites(root: Path) -> dict[str, Path]:
    return {name: root / "sites" / name / "dicom" for name in ("anker", "birke")}


def test_patients_of_no_site_are_fine(folders: Path) -> None:
    refuse_overlap(folders / "holdout" / "dicom", _sites(folders))


def test_one_image_under_another_name_is_found(folders: Path, tmp_path: Path) -> None:
    holdout = tmp_path / "holdout"
    shutil.copytree(folders / "holdout", holdout)
    image = next((folders / "sites" / "birke" / "dicom").rglob("*.dcm"))
    shutil.copy(image, holdout / "dicom" / "renamed.bin")
    with raises(OptionInvalid, match="shares 1 image with birke"):
        refuse_overlap(holdout / "dicom", _sites(folders))


def test_the_same_junk_in_two_places_means_nothing(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "all")
    for folder in ("holdout", "sites/anker"):
        (tmp_path / "all" / folder / "dicom" / "readme.txt").write_text("scanner 7" * 100)
    refuse_overlap(tmp_path / "all" / "holdout" / "dicom", _sites(tmp_path / "all"))


def test_a_site_as_hold_out_is_refused_before_a_round(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", patients=20, images=1)
    run = Simulation(study(), sites, tmp_path / "run", holdout=sites / "clara")
    with raises(OptionInvalid, match="shares 20 images with clara"):
        run_simulation(run)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.slow
def test_a_start_that_failed_can_be_repeated_in_its_folder(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", patients=24, images=1)
    out = tmp_path / "run"
    asked = study(training="rounds = 1")
    with raises(OptionInvalid, match="shares 24 images"):
        run_simulation(Simulation(asked, sites, out, holdout=sites / "clara"))
    assert run_simulation(Simulation(asked, sites, out))["rounds"] == 1


def test_a_hold_out_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", patients=4, images=1)
    run = Simulation(study(), sites, tmp_path / "run", holdout=tmp_path / "nowhere")
    with raises(OptionInvalid, match=r"nowhere has no folder dicom/"):
        run_simulation(run)
    assert not (tmp_path / "run").exists()


# How the server comes by the client's reading.


def offer(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Let these be all that is installed for reading hold-outs."""
    found = [EntryPoint(NAME, value, GROUP) for value in values]
    monkeypatch.setattr(of_server, "own_entry_points", lambda group: found)


def test_the_client_s_reading_is_found_as_an_entry_point() -> None:
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    assert project["entry-points"][GROUP] == {NAME: "cloister_fl.client.holdout:read_holdout"}
    assert load_reader() is read_holdout


def test_a_distribution_that_is_found_twice_offers_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = tmp_path / f"{DISTRIBUTION.replace('-', '_')}-0.1.0.dist-info"
    twin.mkdir()
    (twin / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 0.1.0\n")
    (twin / "entry_points.txt").write_text(
        f"[{GROUP}]\n{NAME} = cloister_fl.client.holdout:read_holdout\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    named = [one for one in importlib.metadata.distributions() if one.name == DISTRIBUTION]
    assert len(named) > 1
    assert load_reader() is read_holdout


def test_without_a_client_a_hold_out_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    with raises(ExtraMissing) as caught:
        load_reader()
    assert caught.value.remedy == f"Run: {install_command('client,server')}"


def test_a_package_that_the_client_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cloister_fl.client.not_there:read_holdout")
    with raises(ExtraMissing, match=r"needs cloister_fl.client.not_there, which"):
        load_reader()


def test_two_packages_that_read_hold_outs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "cloister_fl.client.holdout:read_holdout", "other.reading:read")
    with pytest.raises(InternalError, match=r"is cloister_fl.client.holdout:read_holdout, other"):
        load_reader()


def test_no_run_is_proposed_where_its_hold_out_cannot_be_read(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = new_coordinator(tmp_path / "fed")
    before = {path for path in place.root.rglob("*") if path.is_dir()}
    file = tmp_path / "study.toml"
    file.write_text(study_text())
    for check in ("_require_serving", "_require_sites"):
        monkeypatch.setattr(run_commands, check, lambda *given: None)
    offer(monkeypatch)
    with raises(ExtraMissing, match="hold-out"):
        run_commands.run(file, place.root, folders / "holdout", follow=False)
    assert {path for path in place.root.rglob("*") if path.is_dir()} == before
