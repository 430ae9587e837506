"""The audit of whole rounds: sound code passes each stage, and planted faults are refuted.

What is planted here is patched in this process. tests/support/round_mutants.py holds faults that
are planted in a copy of the package; the command that a hospital runs must refute each of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister_fl.client.admission import gate
from cloister_fl.client.privacy_audit import round_audit
from cloister_fl.client.privacy_audit.round_audit import (
    Stage,
    audit_rounds,
    stages_of_code,
)
from cloister_fl.client.privacy_audit.whole_round.audited_studies import small_study
from cloister_fl.client.privacy_audit.whole_round.charge_claims import judge_charges
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.privacy_audit.whole_round.front_door import judge_front_door
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import cohort_of, kinds_of
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference
from cloister_fl.client.privacy_audit.whole_round.study_rounds import stages_of_study
from cloister_fl.client.privacy_audit.whole_round.sum_claims import judge_study, judge_synthetic
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import (
    RoundRefused,
    ThrowawaySite,
)
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.training import exact_sum, local_training, per_patient_gradients
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.study.schema import Study
from support import round_mutants
from support.round_mutants import MUTANTS, VARIANTS, Mutant

pytestmark = pytest.mark.usefixtures("one_thread")


def refuted(stage: Stage) -> set[Claim]:
    """The claims that one stage refutes."""
    found = audit_rounds({"stage": stage})
    return {one.claim for one in found.evidence.findings}


def judged(study: Study, *, patients: int = 4) -> Stage:
    """The clipped sums of a study."""
    return lambda evidence, _: judge_study(evidence, study, patients=patients)


def test_noise_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuted(round_audit._large_noise) == set()
    honest = SecureRandom.normal

    def cut(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        return honest(self, n, std, **rest).clamp_(-3 * std, 3 * std)

    monkeypatch.setattr(SecureRandom, "normal", cut)
    assert Claim.NOISE_SHAPE in refuted(round_audit._large_noise)


def test_rounds_of_adam_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuted(round_audit._adam) == set()
    honest = local_training.PatientDPOptimizer._finish
    left: list[torch.Tensor] = []

    def heavy(self: Any, total: torch.Tensor) -> None:
        """A tenth of the un-noised sums so far goes on."""
        before = sum(left) if left else torch.zeros_like(total)
        left.append(total // 10)
        honest(self, total + before)

    monkeypatch.setattr(local_training.PatientDPOptimizer, "_finish", heavy)
    assert Claim.ROUNDS_APART in refuted(round_audit._adam)


def test_charges_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuted(judge_charges) == set()
    monkeypatch.setattr(gate, "charge", lambda *_, **__: None)
    assert refuted(judge_charges) == {Claim.CHARGE}


def test_made_up_sums_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(evidence: Evidence, _: Path) -> None:
        judge_synthetic(evidence)

    assert refuted(stage) == set()
    honest = exact_sum._GridSum._norms

    def without_the_last(self: Any, parts: Any, pieces: Any) -> list[float]:
        return [*honest(self, parts, pieces)[:-1], 0.0]

    monkeypatch.setattr(exact_sum._GridSum, "_norms", without_the_last)
    assert refuted(stage) == {Claim.SUM}


def test_networks_that_mix_patients_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_fl.networks import small_cnn

    stage = judged(small_study("sums", rounds=1))
    assert refuted(stage) == set()
    honest = small_cnn.MeanMaxPool.forward
    seen = [0.0]

    def mixed(self: Any, maps: torch.Tensor) -> torch.Tensor:
        """Patients go through the network one by one; this keeps something of each."""
        pooled = honest(self, maps)
        before, seen[0] = seen[0], 0.01 * float(pooled.detach().mean())
        return pooled - before

    monkeypatch.setattr(small_cnn.MeanMaxPool, "forward", mixed)
    monkeypatch.setattr(per_patient_gradients, "_tried", {})
    assert Claim.APART in refuted(stage)


@pytest.mark.process
def test_a_site_with_files_is_judged() -> None:
    assert refuted(judge_front_door) == set()


def test_a_refused_round_is_a_finding_and_ends_the_audit() -> None:
    study = small_study("refused", rounds=1)

    def refused(_: Evidence, folder: Path) -> None:
        model = Reference(study).first
        site = ThrowawaySite(folder / "site", study, model)
        site.place(cohort_of(study, kinds_of(study, 2), [1, 1]))
        with pytest.raises(RoundRefused, match="message"):
            site.train(2, model)
        site.train(1, model)
        site.train(1, model)

    done: list[tuple[int, int]] = []
    found = audit_rounds(
        {"one": refused, "two": refused}, progress=lambda *numbers: done.append(numbers)
    )
    (finding,) = found.evidence.findings
    assert (finding.claim, finding.test) == (Claim.TAKES_PART, "one")
    assert finding.detail.startswith("round-spent: CLO-")
    assert (found.passed, found.done, found.left) == (False, ("one",), ("two",))
    assert done == [(1, 2)]


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders: list[Path] = []

    def stage(_: Evidence, folder: Path) -> None:
        folders.append(folder)
        assert folder.parent.parent == tmp_path
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        (folder / "file").touch()

    audit_rounds({"stage": stage})
    assert len(folders) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_stages_together_make_fewer_tests_than_the_level_allows() -> None:
    """Their numbers are fixed by the stages; a study adds at most a quarter of them."""
    assert next(iter(stages_of_code())).startswith("noise, sampling and release")
    assert len(stages_of_code()) == 11


# A whole audit, and faults that are planted in a copy of the package


@pytest.mark.slow
@pytest.mark.process
def test_the_installed_code_passes() -> None:
    found = audit_rounds(stages_of_code())
    assert found.evidence.findings == []
    assert all(
        found.evidence.tests.get(claim, 0) + found.evidence.checks.get(claim, 0)
        for claim in Claim
        if claim is not Claim.TAKES_PART
    )
    assert sum(found.evidence.tests.values()) < 400


STUDIES: dict[str, Callable[[], Study]] = {
    "sampled": lambda: _study(training={"steps": 3, "sampling_rate": 0.1, "rounds": 4}),
    "opacus, released": lambda: _study(
        training={"engine": "opacus", "rounds": 3}, evaluation={"release_epsilon": 1.0}
    ),
    "momentum": lambda: _study(training={"momentum": 0.9, "steps": 2, "schedule": "cosine"}),
    "adam, augmented": lambda: _study(
        training={"optimizer": "adam", "augment": True, "steps": 4, "learning_rate": 0.01}
    ),
    "one round": lambda: _study(training={"rounds": 1}),
    "fixed filters": lambda: _study(
        network={"name": "filter-bank", "arguments": {"width": 8}}, input={"size": 32}
    ),
    "masks": lambda: _study(
        network={"name": "unet", "arguments": {"width": 4}},
        target={"kind": "segmentation", "segment": "lung"},
    ),
}


def _study(**tables: dict[str, Any]) -> Study:
    """A study as people ask for it, with secure aggregation and an epsilon of 3."""
    given = small_study("asked", rounds=5, learning_rate=0.5).model_dump(mode="json")
    usual = {
        "privacy": {"epsilon": 3.0, "clipping_norm": 1.0},
        "aggregation": {"secure": True, "min_sites": 5},
        "training": {"expected_batch": 20, "learning_rate": 0.5},
    }
    for name in {*usual, *tables}:
        told = tables.get(name, {})
        whole = name in {"network", "target"}
        given[name] = told if whole else {**given[name], **usual.get(name, {}), **told}
    return Study.model_validate(given)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_rounds_of_a_study_pass(name: str) -> None:
    found = audit_rounds(stages_of_study(STUDIES[name]()))
    assert found.evidence.findings == []
    assert sum(found.evidence.tests.values()) < 250


@pytest.mark.slow
def test_too_little_noise_of_a_study_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SecureRandom.normal

    def less(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        return honest(self, n, 0.9 * std, **rest)

    monkeypatch.setattr(SecureRandom, "normal", less)
    found = audit_rounds(stages_of_study(STUDIES["sampled"]()))
    assert Claim.NOISE_SIZE in {one.claim for one in found.evidence.findings}


@pytest.mark.parametrize("mutant", [*MUTANTS, *VARIANTS], ids=str)
def test_patch_fits(mutant: Mutant) -> None:
    text = (round_mutants.ROOT / mutant.file).read_text("utf-8")
    for old, new in mutant.patches:
        assert text.count(old) == 1
        text = text.replace(old, new)
    compile(text + mutant.more, mutant.file, "exec")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("mutant", [*MUTANTS, *VARIANTS], ids=str)
def test_a_planted_fault_is_refuted(mutant: Mutant, tmp_path: Path) -> None:
    init_site(tmp_path / "site")
    places = round_mutants.planted(mutant, tmp_path / "source")
    done = round_mutants.audit(places, tmp_path / "site")
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert any(claim["refuted"] for claim in told["claims"])
