"""Faults of the step that are patched in and must be noticed, each beside the sound code.

Each check takes no argument but the installed code, holds for it, and fails for the mutant; the
audit of whole rounds (tests/support/round_mutants.py) has more.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client import app, app_state
from cloister_fl.client.admission import gate
from cloister_fl.client.app_state import Kept
from cloister_fl.client.ledger import rollback
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.training import local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.dp_optimizer import PatientDPOptimizer
from cloister_fl.client.training.sampling import Bag
from cloister_fl.errors import NetworkUnfit, RoundAlreadySpent
from cloister_fl.networks import batch_independence, registry
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.privacy.accounting import calibrate
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.study.schema import Study
from support import studies
from support.cohorts import OnePatient, Patients
from support.spending import admission


def alike(count: int) -> Patients:
    """Patients who are all the same, one image each."""
    image = np.random.default_rng(0).integers(0, 65536, (1, 16, 16)).astype(np.uint16)
    return Patients(
        np.repeat(image, count, axis=0), tuple(OnePatient(1, (i,)) for i in range(count))
    )


def study_of(rate: float = 1.0, rounds: int = 3) -> Study:
    return studies.study(
        input={"size": 16},
        training={
            "sampling_rate": rate,
            "expected_batch": 8,
            "rounds": rounds,
            "learning_rate": 1.0,
        },
    )


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).train()


def trained(cohort: Patients, rate: float = 1.0, steps: int = 1) -> NDArray[np.float32]:
    return local_training.train_round(
        network(), cohort, study_of(rate), noise_multiplier=1.0, random=SecureRandom(),
        round_number=1, steps=steps,
    )  # fmt: skip


# Who takes part in a step.


def sizes_are_those_of_a_poisson_sample(monkeypatch: pytest.MonkeyPatch) -> bool:
    """1,500 steps over 30 patients at rate 0.3: the variance of the batch is 6.3, to 17 %.

    Sound code is accused with a chance of 5e-6 (4.6 standard deviations of a variance); a batch
    of fixed size has the variance 0 and is never missed.
    """
    sizes: list[int] = []

    class Watched:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def blocks(self, _: Any, bags: list[Bag], *weights: object) -> list[Tensor]:
            sizes.append(len(bags))
            return []

        def to_standard_module(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(local_training, "PatientGradSampleModule", Watched)
        trained(alike(30), rate=0.3, steps=1_500)
    assert len(sizes) == 1_500
    mean_fits = abs(float(np.mean(sizes)) - 9) < 4.6 * (6.3 / 1_500) ** 0.5
    return mean_fits and abs(float(np.var(sizes)) / 6.3 - 1) < 0.17


def test_batches_of_fixed_size_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_are_those_of_a_poisson_sample(monkeypatch)

    def shuffled(cohort: Patients, source: SecureRandom, *, rate: float, **_: Any) -> list[Bag]:
        order = source.shuffle(range(len(cohort.patients)))
        chosen = sorted(order[: round(rate * len(order))])
        return [Bag(np.array(cohort.patients[i].images)) for i in chosen]

    monkeypatch.setattr(local_training, "draw_bags", shuffled)
    assert not sizes_are_those_of_a_poisson_sample(monkeypatch)


# What the sum is divided by.


def the_step_grows_with_the_patients(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Twice the patients, all alike, move the weights twice as far; no chance in it."""
    with monkeypatch.context() as patch:
        patch.setattr(SecureRandom, "normal", lambda _, n, __: torch.zeros(n, dtype=torch.float64))
        torch.manual_seed(0)
        few = trained(alike(3))
        torch.manual_seed(0)
        many = trained(alike(6))
    assert np.abs(few).max() > 1e-3
    return bool(np.allclose(many, 2 * few, atol=1e-5))


def test_a_divisor_of_the_true_batch_size_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert the_step_grows_with_the_patients(monkeypatch)
    honest = PatientDPOptimizer.step_on

    def step_on(self: PatientDPOptimizer, blocks: Any) -> None:
        blocks = list(blocks)
        self.expected_batch_size = sum(len(block) for block in blocks)
        honest(self, blocks)

    monkeypatch.setattr(PatientDPOptimizer, "step_on", step_on)
    assert not the_step_grows_with_the_patients(monkeypatch)


# What a crash costs.


def site_at(folder: Path, study: Study) -> Site:
    """A site with the study's steps reserved."""
    site = init_site(folder, name="north")
    mechanism = Mechanism(calibrate(3.0, 1e-5, 1.0, study.training.total_steps), 1.0)
    Ledger.open(site.ledger, delta=site.policy.ledger_delta).reserve(
        study.digest, "run", mechanism=mechanism, steps=study.training.total_steps, delta=1e-5,
        epsilon_limit_study=3.0, epsilon_limit_lifetime=8.0,
    )  # fmt: skip
    SiteSession(site).note()
    return site


def round_one(site: Site, study: Study) -> None:
    """Open, charge and train a round, as the app does once a study is let in."""
    model = flatten(registry.build(study.network, 2, 1, size=16, seed=0))
    kept, session, admitted = Kept(), SiteSession(site), admission(study, "run")
    network = kept.network(session, admitted, model)
    gate.charge(session, admitted, round_number=1)
    app._trained(kept, session, admitted, network, 1)


def a_crash_is_not_refunded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A round that dies in its training stays spent and is refused the second time."""
    study = study_of()
    site = site_at(folder, study)

    class Dies(Exception):
        pass

    def dying(*_: Any, **__: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "parts", lambda *_: (alike(4), alike(4)))
        patch.setattr(app, "train_round", dying)
        with pytest.raises(Dies):
            round_one(site, study)
        try:
            round_one(site, study)
        except RoundAlreadySpent:
            left = Ledger.open(site.ledger, delta=site.policy.ledger_delta).reservations()[0].left
            return left == study.training.total_steps - 1
        except Dies:
            return False
    raise AssertionError


def test_a_refund_at_a_crash_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_crash_is_not_refunded(tmp_path / "sound", monkeypatch)
    honest = gate.charge, app._trained
    before = tmp_path / "before"

    def charging(session: SiteSession, *given: Any, **named: Any) -> None:
        shutil.copy(session.site.ledger, before)
        honest[0](session, *given, **named)

    def refunding(kept: Any, session: SiteSession, *given: Any) -> Any:
        try:
            return honest[1](kept, session, *given)
        except Exception:
            for name in (rollback.FILE, "audit/audit.jsonl"):
                (session.site.root / name).unlink()
            shutil.copy(before, session.site.ledger)
            SiteSession(session.site).note()
            raise

    monkeypatch.setattr(gate, "charge", charging)
    monkeypatch.setattr(app, "_trained", refunding)
    assert not a_crash_is_not_refunded(tmp_path / "refunding", monkeypatch)


# Patients who mix.


class Mixing(nn.Module):
    """Subtracts the mean of the batch; layer by layer nothing is to be seen of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 2)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(start_dim=1)
        result: Tensor = self.layer(flat - flat.mean(dim=0))
        return result


def test_a_network_that_mixes_patients_is_refused_before_the_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    site = site_at(tmp_path, study)
    monkeypatch.setattr(app_state, "build", lambda *_: Mixing().train())
    with pytest.raises(NetworkUnfit, match="another image"):
        round_one(site, study)
    assert Ledger.open(site.ledger, delta=site.policy.ledger_delta).reservations()[0].left == 3


def test_a_network_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    honest = batch_independence._refuse_leak
    monkeypatch.setattr(batch_independence, "_proved", set())
    monkeypatch.setattr(
        batch_independence, "_refuse_leak", lambda *given: tries.append(1) or honest(*given)
    )
    for _ in range(3):
        require_private(network(), size=16)
    assert len(tries) == 1
    require_private(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).train(), size=16)
    assert len(tries) == 2
    for _ in range(2):
        with pytest.raises(NetworkUnfit):
            require_private(Mixing().train(), size=16)
