"""The laws that updates are held against: against torch, against accountants, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cloister_fl.client.privacy_audit.whole_round import noise_claims
from cloister_fl.client.privacy_audit.whole_round.audited_studies import small_study
from cloister_fl.client.privacy_audit.whole_round.epsilon_claim import epsilon_of
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.privacy_audit.whole_round.influence_claims import (
    judge_nothing_left,
    judge_signs,
    judge_update,
)
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import cohort_of, kinds_of
from cloister_fl.client.privacy_audit.whole_round.noise_claims import judge_adam, judge_noise
from cloister_fl.client.privacy_audit.whole_round.round_reference import (
    Law,
    Reference,
    response,
    steps_of,
)
from cloister_fl.client.privacy_audit.whole_round.sampling_claims import (
    attendance,
    judge_rate,
    judge_repeats,
    judge_sizes,
)
from cloister_fl.privacy.accounting import epsilon_pld

SIZE = 400


class Kept(Evidence):
    """Evidence that keeps every p-value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[float]] = {}

    def test(self, claim: Claim, what: str, p: float, detail: str = "") -> None:
        self.seen.setdefault(f"{claim.name} {what}", []).append(p)


class Layers:
    """What the judges ask of a reference: two layers."""

    layers = (("first", slice(0, 300)), ("last", slice(300, SIZE)))


def law_of(kinds: int, seed: int = 0, *, size: float = 3.0) -> Law:
    generator = np.random.default_rng(seed)
    shares = generator.standard_normal((kinds, SIZE))
    shares *= size / np.linalg.norm(shares, axis=1, keepdims=True)
    ones = np.ones(SIZE)
    return Law(ones > 0, 1e-6 * ones, shares, 1e-12 * ones)


def draws(law: Law, mean: Any, generator: np.random.Generator) -> Any:
    """An update of the law."""
    return -law.deviation * (np.asarray(mean) @ law.shares + generator.standard_normal(SIZE))


@pytest.mark.slow
def test_sound_updates_are_seldom_accused() -> None:
    """150 simulated audits: each test's p-values are uniform or larger."""
    generator, kept = np.random.default_rng(3), Kept()
    law, counts = law_of(4), [3, 0, 5, 1]
    for _ in range(150):
        update = draws(law, counts, generator)
        judge_update(kept, "u", Layers(), law, counts, update, Claim.INFLUENCE)  # type: ignore[arg-type]
        nothing = [draws(law, [0] * 4, generator) for _ in range(2)]
        judge_noise(kept, "n", Layers(), law, nothing)  # type: ignore[arg-type]
        judge_nothing_left(kept, "l", law, counts, law, nothing[0])
        judge_signs(kept, "s", law.shares[0], nothing[1])
        judge_adam(kept, "a", 3, [noise_claims._adam(3, 500)])
        rounds = []
        for _ in range(6):
            coins = generator.binomial([8, 8, 8, 8], 0.3) / 2
            rounds.append(attendance(law, [4] * 4, draws(law, coins, generator), steps=2, rate=0.3))
        seen = [one for one, _ in rounds]
        judge_rate(kept, "r", seen)
        judge_sizes(kept, "z", seen)
        judge_repeats(kept, "p", list(zip(seen[:3], seen[3:], strict=True)))
    assert len(kept.seen) == 19
    for name, found in kept.seen.items():
        for level in (0.2, 0.05, 0.01):
            share = np.mean(np.array(found) < level)
            assert share <= level + 5 * math.sqrt(level / len(found)), name


def test_who_took_part_is_read_off_an_update() -> None:
    generator, law = np.random.default_rng(5), law_of(4, size=30.0)
    one, noise = attendance(law, [4] * 4, draws(law, [1, 2, 0, 1.5], generator), steps=2, rate=0.5)
    assert one.coins == pytest.approx([2, 4, 0, 3], abs=0.4)
    assert list(one.thrown) == [8] * 4
    assert np.mean(noise**2) == pytest.approx(1, abs=0.25)


def _moved(momentum: float, mu: float, steps: int, noises: Any) -> float:
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=momentum)
    for step in range(steps):
        weight.grad = torch.tensor([noises[step]], dtype=torch.float64) + mu * weight.detach()
        optimizer.step()
    return float(weight.detach())


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5), (0.9, 0.5)])
def test_responses_are_those_of_torch(momentum: float, mu: float) -> None:
    study = small_study("s", rounds=3, steps=4, momentum=momentum, proximal=mu)
    study = study.model_copy(
        update={"training": study.training.model_copy(update={"learning_rate": 0.5})}
    )
    noises = np.random.default_rng(0).standard_normal(4)
    assert -response(study, 1) @ noises == pytest.approx(_moved(momentum, mu, 4, noises))


@pytest.mark.long
@pytest.mark.parametrize(("epochs", "rate"), [(1.0, 0.3), (2.5, 0.5), (0.01, 0.5), (1.0, 0.1)])
def test_steps_are_those_of_the_study(epochs: float, rate: float) -> None:
    study = small_study("s", rounds=1, sampling_rate=rate, epochs=epochs)
    assert steps_of(study) == study.training.steps_per_round


@pytest.mark.long
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.0, 1.0, 1), (10.77, 1.0, 60), (1.0, 0.02, 1_000), (0.7, 0.5, 30), (0.25, 0.5, 10)],
)
def test_epsilon_agrees_with_the_accountant_of_record(
    sigma: float, rate: float, steps: int
) -> None:
    own = epsilon_of([(sigma, rate, steps)], 1e-5)
    assert own == pytest.approx(epsilon_pld(sigma, rate, steps, 1e-5), abs=0.01)


def test_epsilon_of_no_noise_has_no_bound() -> None:
    assert epsilon_of([(0.0, 1.0, 1)], 1e-5) == math.inf
    assert epsilon_of([(1e3, 0.01, 1)], 1e-5) == 0


def test_gradients_are_those_of_the_definition() -> None:
    study = small_study("s", rounds=1)
    reference, kinds = Reference(study), kinds_of(study, 4)
    weights = reference.first.astype(np.float64)
    long = reference.gradients(kinds, weights, 1e9)
    short = reference.gradients(kinds, weights, 8.0)
    norms = np.linalg.norm(long, axis=1)
    assert np.linalg.norm(short, axis=1) == pytest.approx(np.minimum(norms, 8.0))
    step = 1e-6
    for place in (0, 700, reference.size - 1):
        moved = weights.copy()
        moved[place] += step
        reference.gradients([], moved, 1.0)
        above = [float(reference._losses(kind).detach().mean()) for kind in kinds]
        moved[place] -= 2 * step
        reference.gradients([], moved, 1.0)
        below = [float(reference._losses(kind).detach().mean()) for kind in kinds]
        slopes = (np.array(above) - below) / (2 * step)
        assert long[:, place] == pytest.approx(slopes, rel=1e-3, abs=1e-5)


def test_made_up_patients_are_what_was_asked_for() -> None:
    study = small_study("s", rounds=1, classes=3, images_per_patient=2)
    kinds = kinds_of(study, 6, images=(1, 2, 5))
    assert [kind.label for kind in kinds] == [0, 1, 2, 0, 1, 2]
    assert [len(kind.images) for kind in kinds] == [1, 1, 2, 2, 5, 5]
    # Of more images than a step takes, any two are the same.
    assert (kinds[4].images == kinds[4].images[0]).all()
    assert (kinds[2].images[0] != kinds[2].images[1]).any()
    cohort = cohort_of(study, kinds, [1, 0, 2, 1, 0, 0])
    assert len(cohort.patients) == 4
    assert sorted(patient.label for patient in cohort.patients) == [0, 0, 2, 2]
    for patient in cohort.patients:
        assert set(cohort.targets[list(patient.images)]) == {patient.label}
    assert len(cohort_of(study, [], []).images) == 0
    flat = kinds_of(study, 2, flat=True)
    assert all(len(np.unique(kind.images)) == 1 for kind in flat)
