"""A second site folder for the same patients: noticed where a person freezes or checks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data.loading import freeze, load_for_run, load_frozen
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import CloisterError, LedgerUnlinked
from cloister_fl.study.cost import charges
from support import studies
from support.dicom import write_site
from support.errors import raises
from support.spending import admit

pytestmark = pytest.mark.process

STUDY = studies.study()
SMALL = Policy(
    patients_at_most=1_000,
    min_patients=1,
    min_sites=2,
    approve="listed",
    approved_hashes=(STUDY.digest,),
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOISTER_STATE", str(tmp_path / "state"))
    return write_site(tmp_path / "data", 4, key="PatientID")


def _site(data: Path, name: str, *, throwaway: bool = False) -> Site:
    return init_site(
        data.parent / name,
        name=name,
        dicom=data / "dicom",
        labels=data / "labels.csv",
        policy=SMALL,
        throwaway=throwaway,
    )


def _spent(data: Path, name: str) -> Site:
    site = _site(data, name)
    freeze(site, STUDY)
    admit(site, STUDY, run="run", invited=5)
    return site


def _codes(site: Site) -> list[str]:
    return [fault.code for fault in inspect(site, STUDY).faults]


def _run(site: Site, *words: str) -> str:
    result = CliRunner().invoke(client_group.app, [*words, "--dir", str(site.root)])
    if isinstance(result.exception, CloisterError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_new_ledger_for_patients_of_another_stops_check_and_freeze_until_it_is_linked(
    data: Path,
) -> None:
    old, new = _spent(data, "old"), _site(data, "new")
    assert _codes(old) == []
    assert _codes(new) == ["CLO-312"]
    told = render(inspect(new, STUDY), new.root)
    assert f"{old.root} (site old): 4 patients" in told
    assert f"budget link {old.root} --dir {new.root}" in told
    assert "MRN" not in told
    with raises(LedgerUnlinked):
        freeze(new, STUDY)
    assert "Linked at new." in _run(new, "budget", "link", str(old.root), "--yes")
    assert _codes(new) == []
    freeze(new, STUDY)
    # The old one is not for use any more, and says so.
    assert _codes(old) == ["CLO-312"]
    assert "continued" in render(inspect(old, STUDY))


def test_a_chain_of_linked_folders_is_counted_whole(data: Path) -> None:
    old, second, third = _spent(data, "old"), _site(data, "second"), _site(data, "third")
    _run(second, "budget", "link", str(old.root), "--yes")
    freeze(second, STUDY)
    assert f"{old.root} (site old)" in render(inspect(third, STUDY))
    _run(third, "budget", "link", str(second.root), "--yes")
    assert _codes(third) == []


def test_patients_that_are_others_are_said_to_be_once_with_a_reason(data: Path) -> None:
    old, new = _spent(data, "old"), _site(data, "new")
    with raises(CloisterError):
        _run(new, "budget", "separate", str(old.root), "--why", "  ")
    _run(new, "budget", "separate", str(old.root), "--why", "numbers begin at 1 in both")
    assert _codes(new) == _codes(old) == []
    freeze(new, STUDY)
    (entry,) = [one for one in entries_of(new) if one.kind == "separate"]
    assert entry.body["why"] == "numbers begin at 1 in both"


def test_a_folder_that_spent_nothing_stops_nobody(data: Path) -> None:
    first, second = _site(data, "first"), _site(data, "second")
    freeze(first, STUDY)
    freeze(second, STUDY)
    assert _codes(first) == _codes(second) == []


def test_a_folder_that_was_deleted_is_not_forgotten(data: Path) -> None:
    old, new = _spent(data, "old"), _site(data, "new")
    shutil.rmtree(old.root)
    assert _codes(new) == ["CLO-312"]
    assert "the folder is gone" in render(inspect(new, STUDY))


def test_a_copy_of_a_site_folder_is_noticed_on_both_sides_once_it_is_known(data: Path) -> None:
    old = _spent(data, "old")
    # A run, which knows of the ledger that was made after the study was frozen.
    load_frozen(old, STUDY)
    copy = data.parent / "copy"
    shutil.copytree(old.root, copy)
    site = init_site(copy)
    assert _codes(site) == ["CLO-312"]
    assert "is a copy of that in" in render(inspect(site, STUDY))
    # Moved, and not copied: the same ledger in another place.
    shutil.rmtree(old.root)
    assert _codes(site) == []


def test_a_run_that_freezes_by_itself_is_not_stopped_and_tells_its_own_people_alone(
    data: Path,
) -> None:
    _spent(data, "old")
    new = _site(data, "new")
    assert len(load_for_run(new, STUDY).patients) == 4
    assert data_notices(new.root)[STUDY.digest].code == "CLO-312"
    # The log's head travels with each answer: an entry would tell of the patients.
    assert [one.kind for one in entries_of(new)] == ["frozen", "signed"]
    # And is known from then on.
    ledger = Ledger.open(new.ledger, delta=new.policy.ledger_delta)
    used = charges(STUDY)
    ledger.reserve(STUDY.digest, "r", used.step, used.steps, used.delta, 9.0, 9.0)
    assert _codes(_site(data, "third")) == ["CLO-312"]


def test_sites_of_a_simulation_are_neither_known_nor_stopped(data: Path) -> None:
    made = _site(data, "made", throwaway=True)
    freeze(made, STUDY)
    admit(made, STUDY, run="run", invited=5)
    new = _site(data, "new")
    assert _codes(new) == []
    _spent(data, "old")
    assert _codes(made) == []
    load_frozen(_site(data, "another", throwaway=True), STUDY)
    assert len(list((data.parent / "state").glob("*.ledger"))) == 1


def test_a_registry_that_cannot_be_used_is_told_and_stops_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spent(data, "old")
    (data / "file").touch()
    monkeypatch.setenv("CLOISTER_STATE", str(data / "file" / "state"))
    new = _site(data, "new")
    report = inspect(new, STUDY)
    assert report.faults == ()
    assert "The machine's registry of ledgers cannot be used" in render(report)
    freeze(new, STUDY)
    assert [one.kind for one in entries_of(new)] == ["frozen", "signed"]
    monkeypatch.setenv("CLOISTER_STATE", "none")
    assert "No registry of ledgers is kept" in str(inspect(new, STUDY).remarks)
