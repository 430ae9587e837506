"""`privacy-audit --study`: on a site's own DICOM, by command, and nothing of it leaves."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from cloister_fl.client.cli import client_group
from cloister_fl.client.privacy_audit import own_data, round_audit
from cloister_fl.client.privacy_audit.one_run import Guesses, OneRunAudit
from cloister_fl.client.privacy_audit.one_run_plot import allowed, roc, write_plot
from cloister_fl.client.privacy_audit.one_run_text import as_dict, render, verdict
from cloister_fl.client.privacy_audit.whole_round import study_rounds
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.errors import (
    CloisterError,
    CohortTooSmall,
    LabelsInvalid,
    OptionInvalid,
    SiteEmpty,
    StudyInvalid,
)
from cloister_fl.privacy.accounting import calibrate, epsilon_pld
from cloister_fl.study.file import load_study
from support import commands
from support.dicom import write_site
from support.errors import raises
from support.federations import with_engine
from support.studies import study_text

ASKED = {
    "study": {"name": "nodules"},
    "input": {"size": 16},
    "network": {"name": "small-cnn", "arguments": {"width": 4}},
    "training": {"rounds": 4, "expected_batch": 20},
}
PRIVACY = {"epsilon": 2.0, "clipping_norm": 0.3}

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]


def _site(root: Path, patients: int) -> Site:
    write_site(root, patients, 2)
    return init_site(root, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return _site(tmp_path_factory.mktemp("north"), 24)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(study_text(**ASKED, privacy=PRIVACY))
    return file


def run(site: Site, *words: object) -> Result:
    return commands.invoke(client_group.app, "privacy-audit", *words, "--dir", site.root)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rounds of made-up patients, which test_round_audit.py is about."""
    monkeypatch.setattr(round_audit, "stages_of_code", lambda _: {})
    monkeypatch.setattr(study_rounds, "stages_of_study", lambda *_: {})


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def normal(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.float64)

    monkeypatch.setattr(SecureRandom, "normal", normal)


def contents(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_it_passes_and_nothing_leaves(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = _site(tmp_path / "site", 16)
    before = contents(site.root)
    connected: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            connected.append(address)
            raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(socket.socket, "sendto", connect)
    result = run(site, "--study", study, "--rounds", 1, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    sigma = calibrate(2.0, 1e-5, 1.0, 4)
    assert told["claimed_epsilon"] == pytest.approx(epsilon_pld(sigma, 1.0, 1, 1e-5))
    assert told["noise_multiplier"] == sigma
    assert told["audited_epsilon"] <= told["claimed_epsilon"] < told["most_epsilon"]
    assert (told["passed"], told["could_refute"]) == (True, True)
    assert told["whole_rounds"]["passed"] is True
    assert (told["canaries"], told["others"], told["steps"]) == (16, 0, 1)
    assert connected == []
    # No model, no ledger: the log is new, and what was read is cached, sealed.
    new = {Path(name).parts[0] for name in contents(site.root) - before}
    assert new == {site.audit.name, site.cache.name, "index.sqlite"}
    assert not site.ledger.exists()


def test_the_log_says_what_was_done_and_nothing_of_the_patients(
    tmp_path: Path, study: Path
) -> None:
    bodies = []
    for name, patients in (("one", 16), ("other", 24)):
        site = _site(tmp_path / name, patients)
        run(site, "--study", study, "--rounds", 1)
        bodies.append([(entry.kind, dict(entry.body)) for entry in entries_of(site)])
    digest = load_study(study).digest
    made_up = {"on": "made-up patients", "passed": True, "study": digest}
    expected = [("audited", made_up), ("audited", {"on": "own patients", "study": digest})]
    assert bodies == [expected] * 2
    # A site without data has the same entry: it is written before they are read.
    empty = init_site(tmp_path / "empty")
    empty.dicom.mkdir(parents=True)
    with raises(SiteEmpty):
        run(empty, "--study", study)
    assert [(entry.kind, dict(entry.body)) for entry in entries_of(empty)] == expected


def test_patients_are_not_read_for_what_is_refuted_already(
    stocked: Site, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuting(evidence: Evidence, _: Path) -> None:
        evidence.require(Claim.SUM, "sum", holds=False)

    monkeypatch.setattr(study_rounds, "stages_of_study", lambda *_: {"sums": refuting})
    monkeypatch.setattr(own_data, "load_cohort", lambda *_, **__: pytest.fail("it read them"))
    result = run(stocked, "--study", study, "--json")
    assert result.exit_code == 4
    told = json.loads(result.stdout)
    assert (told["passed"], set(told)) == (False, {"passed", "whole_rounds"})
    assert "THE CLAIM IS REFUTED" in run(stocked, "--study", study).stdout


def test_training_without_noise_is_refuted(
    stocked: Site, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    plot = tmp_path / "audit.png"
    result = run(stocked, "--study", study, "--rounds", 1, "--plot", plot)
    assert result.exit_code == 4
    assert "THE CLAIM IS REFUTED" in result.stdout
    assert "lower bound and no proof" in result.stdout
    assert "keep it here" in result.stderr
    assert stat.S_IMODE(plot.stat().st_mode) == 0o600
    with Image.open(plot) as image:
        assert image.size[0] > 1_000
        assert np.asarray(image.convert("L")).std() > 10


def test_few_guesses_are_no_test_and_the_words_say_so(
    stocked: Site, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    result = run(stocked, "--study", study, "--guesses", 8, "--canaries", 20)
    assert result.exit_code == 0
    assert "could not have refuted" in result.stdout
    assert "--rounds 1" in result.stdout
    assert "20 patients, each in by a coin; 4 more always in" in result.stdout
    assert "8 of 8" in result.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rounds", 5), "has 4 rounds"),
        (("--canaries", 25), "has 24 patients"),
        (("--guesses", 25), "There are 24 canaries"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    stocked: Site, study: Path, words: tuple[object, ...], says: str
) -> None:
    with raises(OptionInvalid, match=says):
        run(stocked, "--study", study, *words)


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_done(
    stocked: Site, study: Path
) -> None:
    entries = len(entries_of(stocked))
    with raises(OptionInvalid, match=r"audit\.jpg"):
        run(stocked, "--study", study, "--plot", "audit.jpg")
    assert len(entries_of(stocked)) == entries


@pytest.mark.parametrize("option", ["--rounds", "--canaries", "--guesses", "--plot"])
def test_options_of_a_study_need_one(stocked: Site, option: str) -> None:
    with raises(OptionInvalid, match=f"{option} is for the audit of a study"):
        run(stocked, option, 8)


def test_book_keeping_is_not_audited(stocked: Site, study: Path) -> None:
    before = len(entries_of(stocked))
    asked = with_engine(load_study(study), "book-keeping")
    with pytest.raises(StudyInvalid, match="can move its sum of clipped gradients"):
        own_data.prepare(stocked, asked, own_data.Asked())
    assert len(entries_of(stocked)) == before


def test_a_study_without_privacy_claims_nothing(stocked: Site, study: Path) -> None:
    study.write_text(study_text(**ASKED, privacy=PRIVACY | {"enabled": False}))
    entries = len(entries_of(stocked))
    with raises(OptionInvalid, match="without privacy"):
        run(stocked, "--study", study)
    assert len(entries_of(stocked)) == entries


def test_a_site_without_enough_data_refuses(tmp_path: Path, study: Path) -> None:
    few = _site(tmp_path / "few", 6)
    with raises(CohortTooSmall, match="has 6 patients"):
        run(few, "--study", study)
    (few.root / "labels.csv").unlink()
    with pytest.raises(CloisterError) as caught:
        run(few, "--study", study)
    assert isinstance(caught.value, LabelsInvalid)


def test_a_large_network_has_as_many_canaries_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_data, "MOST_VALUES", 12_000)
    assert own_data._canaries(100, 1_000, None) == 12
    assert own_data._canaries(10, 1_000, None) == 10
    assert own_data._canaries(100, 10_000_000, None) == 8
    assert own_data._canaries(100, 1_000, 12) == 12
    with raises(OptionInvalid, match="do not fit into memory"):
        own_data._canaries(100, 1_000, 13)


FOUND = OneRunAudit(
    claimed_epsilon=float(np.log(3)),
    noise_multiplier=2.0,
    sampling_rate=1.0,
    delta=0.05,
    confidence=0.95,
    steps=1,
    others=0,
    guesses=(Guesses(4, 4, 0.5, 0.6, 0.2, 0.1),),
    scores=(0.9, 0.4, 0.4, -0.2),
    present=(True, True, False, False),
)


def test_the_curve_of_the_picture() -> None:
    false, true = roc(FOUND)
    # Equal scores cannot be told apart: one step takes both.
    assert list(zip(false.tolist(), true.tolist(), strict=True)) == [
        (0, 0),
        (0, 0.5),
        (0.5, 1),
        (1, 1),
    ]
    # e^epsilon = 3: 3 x + delta at first, then 1 - (1 - delta - x) / 3.
    most = allowed(FOUND, np.array([0.0, 0.1, 0.5, 1.0]))
    assert most == pytest.approx([0.05, 0.35, 0.85, 1.0])


def test_the_picture_as_svg(tmp_path: Path) -> None:
    file = tmp_path / "audit.svg"
    write_plot(FOUND, file)
    text = file.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    write_plot(FOUND, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_neither_json_nor_words_tell_of_one_patient() -> None:
    told = as_dict(FOUND)
    assert "scores" not in told
    assert "present" not in told
    assert told["could_refute"] is False
    assert told["guesses"] == [
        {"made": 4, "right": 4, "epsilon": 0.5, "most": 0.6, "chance": 0.2, "least_chance": 0.1}
    ]
    words = render(FOUND)
    assert "epsilon 0.500 or more, at confidence 95%" in words
    assert "4 of 4" in words
    assert verdict(FOUND) in words
    assert "Keep it at the site" in words
    assert "0.9" not in words
