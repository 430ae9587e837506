"""Canary audit: does the installed step leak more about one patient than it claims?

White box (Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning"): the
adversary chooses the global models, knows every other patient, and sees what each round returns.
It runs ``local_training.train_round`` as it is installed, many times, half of them with the canary,
a patient of five images, and guesses whether the canary was there.

A draw is two rounds in a row. In the second the adversary hands out the same model with the sign
of its head turned, so that the canary's gradient turns about, too. Noise that is fresh in each
round then behaves as one Gaussian test; noise that repeats cancels while the canary stays.

The guess is a threshold on the inner product of what was returned with the direction of the
canary's own gradients. It lies half way between the means of the two hypotheses in the first tenth
of the draws, which then do not count. Its two error rates are bounded from above by Clopper and
Pearson 1934, each at half of 1 - confidence, and the bounds turned into the most private Gaussian
mechanism that allows them (mu-GDP, Dong et al. 2022), and that into epsilon at the claimed delta.
A step that keeps its claim is accused with a chance of at most 1 - confidence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.training import local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.sampling import Bag, pixels_of
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.privacy.accounting import epsilon_pld
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.schema import About, Input, Privacy, Study, Training
from cloister_fl.tasks.classification import ClassificationTarget

CANARY_IMAGES = 5
_OTHERS = 3
_SIDE = 16
_HIDDEN = 8
_ROUNDS = 2


@dataclass(frozen=True)
class CanaryAudit:
    """What an audit found.

    Attributes:
        claimed_epsilon: what the accountant says of the audited rounds, at ``delta``.
        audited_epsilon: lower bound from the adversary's success; 0 where it learnt nothing.
        draws: how often the two rounds were run, the tenth for the threshold included.
        noise_multiplier: sigma of each round.
        delta: of both epsilons.
        confidence: chance at least with which ``audited_epsilon`` is not above the true one.
        false_alarms: guesses "there" without the canary, as a share.
        misses: guesses "not there" with the canary, as a share.
    """

    claimed_epsilon: float
    audited_epsilon: float
    draws: int
    noise_multiplier: float
    delta: float
    confidence: float
    false_alarms: float
    misses: float

    @property
    def passed(self) -> bool:
        """Whether the claim stands; not a proof of it."""
        return self.audited_epsilon <= self.claimed_epsilon


@dataclass(frozen=True)
class _Patient:
    label: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class _Cohort:
    images: NDArray[np.uint16]
    patients: tuple[_Patient, ...]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class _Attack:
    """One round: the model that is handed out, and what the adversary works out beforehand."""

    module: nn.Module
    others: NDArray[np.float64]
    direction: NDArray[np.float64]


def audit_step(
    draws: int,
    *,
    noise_multiplier: float,
    delta: float,
    confidence: float = 0.99,
    engine: local_training.Engine = "patients",
    progress: Callable[[int], None] | None = None,
) -> CanaryAudit:
    """Audit the installed training step; needs no data and no ledger.

    Args:
        draws: an even number, 40 or more. 600 notice half of the noise or images clipped one by
            one; 10,000 notice 15 % too little noise.
        noise_multiplier: sigma of the step, above 0; about 1 shows most.
        delta: above 0 and below 1.
        confidence: above 0 and below 1.
        engine: as ``training.engine`` of a study with privacy.
        progress: called with the number of draws done, after each.

    Raises:
        ValueError: an argument is outside its range.
        StudyInvalid: the engine does not support a privacy claim.
    """
    if draws < 40 or draws % 2:
        raise ValueError("the draws are an even number, 40 or more")
    if not 0 < confidence < 1:
        raise ValueError("the confidence must be above 0 and below 1")
    require_sound_engine(_study(1.0, engine))
    claimed = epsilon_pld(noise_multiplier, 1.0, _ROUNDS, delta)
    with_canary, canary = _patients()
    without = replace(with_canary, patients=with_canary.patients[:-1])
    modules = _modules()
    clip = min(float(_gradient(module, with_canary, canary).norm()) for module in modules) / 4
    study = _study(clip, engine)
    attacks = [_attack(module, with_canary, clip) for module in modules]
    seen: NDArray[np.float64] = np.empty((draws // 2, 2))
    for number in range(draws):
        there = number % 2
        cohort = with_canary if there else without
        seen[number // 2, there] = sum(
            _statistic(attack, cohort, study, noise_multiplier, index + 1)
            for index, attack in enumerate(attacks)
        )
        if progress is not None:
            progress(number + 1)
    first = draws // 20
    threshold = float(seen[:first].mean())
    half = draws // 2 - first
    alarms = int((seen[first:, 0] > threshold).sum())
    misses = int((seen[first:, 1] <= threshold).sum())
    return CanaryAudit(
        claimed_epsilon=claimed,
        audited_epsilon=_lower_epsilon(alarms, misses, half, delta, confidence),
        draws=draws,
        noise_multiplier=noise_multiplier,
        delta=delta,
        confidence=confidence,
        false_alarms=alarms / half,
        misses=misses / half,
    )


def _statistic(
    attack: _Attack, cohort: _Cohort, study: Study, noise_multiplier: float, number: int
) -> float:
    delta = local_training.train_round(
        attack.module,
        cohort,
        study,
        noise_multiplier=noise_multiplier,
        random=SecureRandom(),
        round_number=number,
        steps=1,
    )
    # Learning rate and divisor are 1: the change of the weights is minus the noised sum.
    return float((-delta.astype(np.float64) - attack.others) @ attack.direction)


def _study(clip: float, engine: local_training.Engine) -> Study:
    return Study(
        study=About(name="canary", question="Was the canary there?"),
        input=Input(size=_SIDE),
        target=ClassificationTarget(column="canary", classes=("no", "yes")),
        training=Training(
            sampling_rate=1.0,
            expected_batch=1,
            images_per_patient=CANARY_IMAGES,
            learning_rate=1.0,
            engine=engine,
        ),
        privacy=Privacy(clipping_norm=clip),
    )


class _Probe(nn.Module):
    """The smallest network with several layers: a draw takes a millisecond or two."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(_SIDE * _SIDE, _HIDDEN, bias=False)
        self.head = nn.Linear(_HIDDEN, 2, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(images.flatten(start_dim=1))))
        return logits


def _patients() -> tuple[_Cohort, _Patient]:
    """Three other patients, then the canary: five images that are nearly the same."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(200, 65336, (_OTHERS + 1, 1, _SIDE, _SIDE))
    # Images that agree let a clipping of single images show five times the sensitivity.
    near = generator.integers(-200, 200, (_OTHERS + 1, CANARY_IMAGES, _SIDE, _SIDE))
    images = (pixels + near).reshape(-1, _SIDE, _SIDE).astype(np.uint16)
    places = np.arange(len(images)).reshape(-1, CANARY_IMAGES).tolist()
    patients = tuple(_Patient(index % 2, tuple(row)) for index, row in enumerate(places))
    targets = np.repeat([patient.label for patient in patients], CANARY_IMAGES)
    return _Cohort(images, patients, targets), patients[-1]


def _modules() -> list[nn.Module]:
    """The model of the first round, and that of the second: its head has the other sign."""
    first, second = _Probe(), _Probe()
    generator = torch.Generator().manual_seed(0)
    body = torch.randn((_HIDDEN, _SIDE * _SIDE), generator=generator) / 64
    # A head of opposite rows, so that what matters of the gradient runs through the body.
    head = torch.tensor([[1.0], [-1.0]]) * torch.ones(_HIDDEN)
    for module, sign in ((first, 1), (second, -1)):
        module.load_state_dict({"body.weight": body, "head.weight": sign * head})
    return [first.train(), second.train()]


def _gradient(module: nn.Module, cohort: _Cohort, patient: _Patient) -> Tensor:
    """A patient's gradient by the definition, float64: of the mean cross entropy."""
    precise = copy.deepcopy(module).double()
    images = pixels_of(cohort, [Bag(np.array(patient.images))]).double()
    loss = F.cross_entropy(precise(images), torch.full((len(images),), patient.label))
    gradients = torch.autograd.grad(loss, list(precise.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _attack(module: nn.Module, cohort: _Cohort, clip: float) -> _Attack:
    *others, canary = (_gradient(module, cohort, patient) for patient in cohort.patients)
    clipped = [gradient * min(1.0, clip / float(gradient.norm())) for gradient in others]
    total = torch.stack(clipped).sum(dim=0).numpy()
    assert total.shape == flatten(module).shape
    return _Attack(module, total, (canary / canary.norm()).numpy())


def _lower_epsilon(alarms: int, misses: int, of: int, delta: float, confidence: float) -> float:
    """Epsilon at ``delta`` of the most private Gaussian mechanism that the errors allow."""
    tail = (1 - confidence) / 2
    normal = NormalDist()
    bounds = [_upper_rate(count, of, tail) for count in (alarms, misses)]
    if max(bounds) >= 1:
        return 0.0
    mu = sum(normal.inv_cdf(1 - bound) for bound in bounds)
    # Less is nothing that can be told from 0, and more noise than any study may have.
    return epsilon_pld(1 / mu, 1.0, 1, delta) if mu > 1e-5 else 0.0


def _upper_rate(count: int, of: int, tail: float) -> float:
    """Clopper and Pearson's upper bound: the rate at which ``count`` or fewer have chance tail."""
    if count == of:
        return 1.0
    steps = np.arange(1, of + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(steps))])
    few = np.arange(count + 1)
    ways = factorials[of] - factorials[few] - factorials[of - few]
    low, high = count / of, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if rate in {low, high}:
            break
        chance = np.exp(ways + few * np.log(rate) + (of - few) * np.log1p(-rate)).sum()
        low, high = (rate, high) if chance > tail else (low, rate)
    return high
