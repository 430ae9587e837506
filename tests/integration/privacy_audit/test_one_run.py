"""The one-run audit: sound training passes, training without its noise is refuted.

Keys are fixed, so that each test comes out the same every time. Sound training is accused with a
chance of at most 5 %; here it lies below 1e-6, for the bound found is far below the claim.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from cloister_fl.client.admission.gate import mechanism
from cloister_fl.client.privacy_audit import one_run
from cloister_fl.client.privacy_audit.one_run import OneRunAudit, audit_training, usual_guesses
from cloister_fl.client.privacy_audit.one_run_bound import epsilon_lower
from cloister_fl.client.privacy_audit.trade_off_bound import chance_of, curve_of
from cloister_fl.client.training import csprng, local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.networks.registry import build
from cloister_fl.privacy.accounting import epsilon_pld
from cloister_fl.study.schema import Study
from support import studies
from support.cohorts import Patients, cohort_of

DELTA = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def counted_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(
        csprng, "_fresh_key", lambda: hashlib.sha256(b"one run %d" % next(count)).digest()
    )


def study_of(
    size: int = 16, network: dict[str, Any] | None = None, epsilon: float = 2.0, **training: Any
) -> Study:
    return studies.study(
        input={"size": size},
        network=network or {"name": "small-cnn", "arguments": {"width": 4}},
        training={"rounds": 12, "expected_batch": 50, **training},
        privacy={"epsilon": epsilon, "delta": DELTA, "clipping_norm": 0.3},
    )


def module_of(study: Study) -> nn.Module:
    return build(study.network, 2, size=study.input.size, seed=0)


def audited(study: Study, cohort: Patients, **how: Any) -> OneRunAudit:
    return audit_training(
        module_of(study),
        cohort,
        study,
        noise_multiplier=mechanism(study).noise_multiplier,
        random=SecureRandom(),
        **{"rounds": study.training.rounds, "canaries": len(cohort.patients), **how},
    )


def weaken(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    honest = SecureRandom.normal

    def normal(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        return honest(self, n, factor * std, **rest)

    monkeypatch.setattr(SecureRandom, "normal", normal)


def test_sound_training_passes_where_it_could_have_been_refuted() -> None:
    study = study_of()
    found = audited(study, cohort_of([2] * 200))
    sigma = mechanism(study).noise_multiplier
    assert found.claimed_epsilon == pytest.approx(epsilon_pld(sigma, 1.0, 12, DELTA))
    assert found.claimed_epsilon <= 2
    assert found.passed
    assert found.audited_epsilon < 1
    assert found.most_epsilon > 3
    assert (found.steps, found.canaries, found.others) == (12, 200, 0)
    assert [line.made for line in found.guesses] == [200, 100, 50, 25]


@pytest.mark.slow
def test_the_audit_sees_something_of_a_study_that_shows_much() -> None:
    found = audited(study_of(epsilon=8.0), cohort_of([2] * 200))
    # Half of the coins would be right by chance alone, give or take 7.
    assert found.guesses[0].right > 125
    assert 0.4 < found.audited_epsilon < 3


def test_what_is_told_follows_from_scores_and_coins() -> None:
    study = study_of()
    found = audited(study, cohort_of([2] * 40), guesses=(10, 30), rounds=3)
    ranked = sorted(zip(found.scores, found.present, strict=True), key=lambda one: -abs(one[0]))
    for line, made in zip(found.guesses, (30, 10), strict=True):
        right = sum((score > 0) == there for score, there in ranked[:made])
        assert (line.made, line.right) == (made, right)
        # Two tests of two numbers of guesses share the 5 %.
        assert line.epsilon == epsilon_lower(40, made, right, DELTA, 0.9875)
        assert line.most == epsilon_lower(40, made, made, DELTA, 0.9875)
        claim = curve_of(mechanism(study).noise_multiplier, 1.0, found.steps)
        assert line.chance == chance_of(claim, 40, made, right)
        assert line.least == chance_of(claim, 40, made, made)
    assert found.level == pytest.approx(0.0125)
    assert found.audited_epsilon == max(line.epsilon for line in found.guesses)


@pytest.mark.parametrize(
    "training",
    [
        {},
        pytest.param(
            {"class_weights": {"normal": 0.2, "nodule": 1.0}, "steps": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"sampling_rate": 0.25, "steps": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "adam", "learning_rate": 0.01, "steps": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"engine": "opacus", "schedule": "cosine", "momentum": 0.9}, marks=pytest.mark.slow
        ),
    ],
)
def test_training_without_noise_is_refuted(
    monkeypatch: pytest.MonkeyPatch, training: dict[str, Any]
) -> None:
    weaken(monkeypatch, 0.0)
    found = audited(study_of(**training), cohort_of([2] * 120))
    assert found.claimed_epsilon <= 2
    assert not found.passed
    assert found.audited_epsilon > 2.5
    assert found.guesses[0].right > 110


def test_few_patients_refute_what_their_epsilon_alone_could_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 patients show an epsilon of 1.6 at most; no noise at a claim of 3 went by unseen."""
    study, cohort = study_of(epsilon=3.0), cohort_of([2] * 24)
    sound = audited(study, cohort)
    assert sound.passed
    assert sound.could_refute
    assert sound.most_epsilon < 2 < sound.claimed_epsilon
    weaken(monkeypatch, 0.0)
    found = audited(study, cohort)
    assert found.guesses[0].right == 24
    assert found.audited_epsilon < found.claimed_epsilon
    assert not found.passed
    assert found.guesses[0].chance < found.level


@pytest.mark.slow
def test_a_fixed_part_of_the_network_is_refuted_without_noise_and_passes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, cohort = study_of(32, {"name": "filter-bank"}), cohort_of([2] * 120, 32)
    assert audited(study, cohort).passed
    weaken(monkeypatch, 0.0)
    assert audited(study, cohort).audited_epsilon > 2.5


@pytest.mark.slow
def test_a_sixth_of_the_noise_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch, 1 / 6)
    found = audited(study_of(), cohort_of([2] * 200))
    assert 2 < found.audited_epsilon < found.most_epsilon


def test_few_patients_refute_a_small_claim_and_that_of_one_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weaken(monkeypatch, 0.0)
    study, cohort = study_of(), cohort_of([2] * 24)
    whole, first = audited(study, cohort), audited(study, cohort, rounds=1)
    # All rounds: every guess is right, and the epsilon alone would bear it.
    assert whole.audited_epsilon < whole.claimed_epsilon
    assert whole.most_epsilon < whole.claimed_epsilon
    assert not whole.passed
    sigma = mechanism(study).noise_multiplier
    assert first.claimed_epsilon == pytest.approx(epsilon_pld(sigma, 1.0, 1, DELTA))
    assert not first.passed


def test_patients_who_are_no_canaries_are_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[int, ...]]] = []
    honest = local_training.train_round

    def watched(module: nn.Module, cohort: Any, *words: Any, **more: Any) -> Any:
        seen.append({one.images for one in cohort.patients})
        return honest(module, cohort, *words, **more)

    monkeypatch.setattr(local_training, "train_round", watched)
    weaken(monkeypatch, 0.0)
    cohort = cohort_of([2] * 60)
    found = audited(study_of(), cohort, canaries=40, rounds=2)
    assert (found.canaries, found.others) == (40, 20)
    # The others' gradients are known and taken off, else no score would be clean.
    assert found.guesses[0].right == 40
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20 + sum(found.present)
    assert 5 < sum(found.present) < 35


def test_coins_are_drawn_anew_and_the_model_is_left_alone() -> None:
    study, cohort = study_of(), cohort_of([2] * 40)
    module = module_of(study)
    before = flatten(module)
    both = [
        audit_training(
            module,
            cohort,
            study,
            noise_multiplier=5.0,
            random=SecureRandom(),
            rounds=2,
            canaries=40,
        )
        for _ in range(2)
    ]
    assert both[0].present != both[1].present
    assert np.array_equal(flatten(module), before)


def test_each_step_goes_on_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(steps=2, schedule="cosine")
    weights, changes, numbers = [], [], []
    honest = local_training.train_round

    def noted(module: nn.Module, *words: Any, **more: Any) -> Any:
        weights.append(flatten(module))
        numbers.append((more["round_number"], more["steps"]))
        changes.append(honest(module, *words, **more))
        return changes[-1]

    monkeypatch.setattr(local_training, "train_round", noted)
    found = audited(study, cohort_of([2] * 20), rounds=2)
    assert found.steps == 4
    assert numbers == [(1, 1), (1, 1), (2, 1), (2, 1)]
    assert np.array_equal(weights[0], flatten(module_of(study)))
    for step in range(3):
        assert np.array_equal(weights[step + 1], weights[step] + changes[step])


@pytest.mark.slow
def test_the_adversary_measures_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not told sigma: where noise is missing, it must not shrink its scores as if it were."""
    variances: list[float] = []
    honest = one_run._Adversary._noise

    def noted(self: Any, powers: Any, along: Any) -> float:
        variances.append(honest(self, powers, along))
        return variances[-1]

    monkeypatch.setattr(one_run._Adversary, "_noise", noted)
    study, cohort = study_of(), cohort_of([2] * 40)
    sigma = mechanism(study).noise_multiplier
    audited(study, cohort)
    weaken(monkeypatch, 0.1)
    audited(study, cohort)
    assert math.sqrt(variances[0]) == pytest.approx(sigma, rel=0.1)
    assert math.sqrt(variances[1]) == pytest.approx(sigma / 10, rel=0.1)


@pytest.mark.slow
def test_the_score_is_the_least_squares_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the textbook's formula on the stacked steps, with nothing accumulated."""
    study, cohort = study_of(rounds=2), cohort_of([2] * 12)
    rows: list[NDArray[np.float64]] = []
    steps: list[NDArray[np.float64]] = []
    clipped, see = one_run._clipped, one_run._Adversary.see

    def noted_rows(*words: Any) -> Any:
        rows.append(clipped(*words).astype(np.float64))
        return rows[-1].astype(np.float32)

    def noted_steps(self: Any, module: Any, change: Any, rate: float) -> None:
        steps.append(change.astype(np.float64) * -50 / (rate * 0.3))
        see(self, module, change, rate)

    monkeypatch.setattr(one_run, "_clipped", noted_rows)
    monkeypatch.setattr(one_run._Adversary, "see", noted_steps)
    monkeypatch.setattr(one_run._Adversary, "_noise", lambda *_: 4.0)
    found = audited(study, cohort)
    design = np.concatenate(rows, axis=1)
    assert design.shape[0] == 12
    assert np.linalg.norm(rows[0], axis=1).max() == pytest.approx(1, abs=1e-5)
    excess = np.concatenate(steps) - design.sum(axis=0) / 2
    # Mean of the posterior: prior covariance 1/4, noise covariance 4.
    whole = np.linalg.inv(design.T @ design / 4 + 4 * np.eye(design.shape[1]))
    assert found.scores == pytest.approx(list(design / 4 @ whole @ excess), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("canaries", "numbers"),
    [(8, (8,)), (15, (15,)), (16, (16, 8)), (400, (400, 200, 100, 50))],
)
def test_usual_numbers_of_guesses(canaries: int, numbers: tuple[int, ...]) -> None:
    assert usual_guesses(canaries) == numbers


@pytest.mark.parametrize(
    "wrong",
    [
        {"canaries": 7},
        {"canaries": 21},
        {"guesses": (21,)},
        {"guesses": (0, 5)},
        {"confidence": 1.0},
        {"rounds": 13},
        {"rounds": 0},
    ],
)
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        audited(study_of(), cohort_of([2] * 20), **wrong)
