"""One-run audit: train once on half of a site's patients, and guess which half.

Steinke, Nasr and Jagielski 2023 (see ``one_run_bound`` and ``trade_off_bound``), white box: each
canary patient is trained on or left out by a fair coin of its own, all with all images, and the
adversary sees what each step of the installed ``local_training.train_round`` gives off. It is the
adversary that the study's epsilon is claimed against: it knows every patient, and not the coins.

A step gives off, in units of the clipping norm, y = q (g_1 s_1 + ... + g_m s_m + o) + noise: g_i
is canary i's clipped gradient at the model before the step, s_i its coin (0 or 1), o the sum of
the patients who are always there, q the sampling rate. Patients of one hospital resemble each
other, so an inner product of y with g_i alone mostly tells of the others. The score of a canary is
its share of the linear least-squares estimate of all coins from all steps together, the coins
taken for Gaussians of mean 1/2 and variance 1/4. The size of the noise is not believed but
estimated from the same y, by the largest likelihood: code that adds too little is met by an
adversary who notices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloister_fl.client.data.images import Images
from cloister_fl.client.privacy_audit.one_run_bound import epsilon_lower
from cloister_fl.client.privacy_audit.trade_off_bound import Curve, chance_of, curve_of
from cloister_fl.client.training import local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.per_patient_gradients import PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort, Patient
from cloister_fl.networks.flat_parameters import flatten, load
from cloister_fl.privacy.accounting import epsilon_pld
from cloister_fl.study.schema import Study

CONFIDENCE = 0.95
FEWEST = 8
"""Fewest canaries: fewer right guesses than that show nothing of interest."""
MOST_VALUES = 1 << 28
"""Most values of canaries' gradients, float32, that are held at a time: 1 GiB."""
_AT_ONCE = 64, 1 << 25
"""Most patients, and most values of their gradients, that are computed at a time."""
_TESTS = 2
"""Tests of each number of guesses: of the epsilon, and of all that noise and steps claim."""
_COLUMNS = 1 << 13
_NOISES = 241

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Guesses:
    """One number of guesses, and what came of it.

    Attributes:
        made: guesses, the most confident ones; fixed before anything is seen.
        right: how many were right.
        epsilon: lower bound that they show; all lines of an audit hold together.
        most: what they would show if all were right.
        chance: of as many right or more, at most, by all that the study claims.
        least: of all being right, likewise.
    """

    made: int
    right: int
    epsilon: float
    most: float
    chance: float
    least: float


@dataclass(frozen=True)
class OneRunAudit:
    """What an audit found; it was computed from patients without noise, and is for use at the site.

    Attributes:
        claimed_epsilon: what the accountant says of the audited steps, at ``delta``.
        noise_multiplier: sigma of each step, as the study has it.
        sampling_rate: of the study.
        delta: of all epsilons.
        confidence: chance at least with which no lower bound is above the true epsilon and no
            sound training is refuted, all lines together.
        steps: how many were run.
        others: patients who were always there.
        guesses: the numbers of guesses that were tried, the largest first.
        scores: of each canary; above 0 says "there".
        present: whether each canary was.
    """

    claimed_epsilon: float
    noise_multiplier: float
    sampling_rate: float
    delta: float
    confidence: float
    steps: int
    others: int
    guesses: tuple[Guesses, ...]
    scores: tuple[float, ...]
    present: tuple[bool, ...]

    @property
    def canaries(self) -> int:
        """Patients whose coins were guessed."""
        return len(self.scores)

    @property
    def audited_epsilon(self) -> float:
        """The largest lower bound."""
        return max(line.epsilon for line in self.guesses)

    @property
    def most_epsilon(self) -> float:
        """The largest lower bound that so many canaries could have shown."""
        return max(line.most for line in self.guesses)

    @property
    def level(self) -> float:
        """The chance below which a line's right guesses refute the claim."""
        return (1 - self.confidence) / (_TESTS * len(self.guesses))

    @property
    def passed(self) -> bool:
        """Whether the claim stands; not a proof of it."""
        unlikely = any(line.chance < self.level for line in self.guesses)
        return self.audited_epsilon <= self.claimed_epsilon and not unlikely

    @property
    def could_refute(self) -> bool:
        """Whether the claim would not have stood, had every guess been right."""
        unlikely = any(line.least < self.level for line in self.guesses)
        return self.most_epsilon > self.claimed_epsilon or unlikely


def usual_guesses(canaries: int) -> tuple[int, ...]:
    """How many guesses to make where nobody says: all, a half, a quarter, an eighth.

    Many guesses show the most where all are right; few are better where most are blind. Numbers
    below ``FEWEST`` are left out.
    """
    numbers = tuple(canaries // share for share in (1, 2, 4, 8))
    return tuple(number for number in numbers if number >= FEWEST) or (canaries,)


def audit_training(
    module: nn.Module,
    cohort: Cohort,
    study: Study,
    *,
    noise_multiplier: float,
    random: SecureRandom,
    rounds: int,
    canaries: int,
    guesses: Sequence[int] = (),
    confidence: float = CONFIDENCE,
    progress: Callable[[int, int], None] | None = None,
) -> OneRunAudit:
    """Train once, as the study would, and see how many coins can be guessed.

    Each step is shown to the adversary, as the accountant assumes; so the study's optimiser, which
    works on noised sums alone, is replaced by plain gradient descent. The model is thrown away.
    No ledger is touched: the caller must not let the result leave the site.

    Args:
        module: the study's first model, in training mode; it is not changed.
        cohort: the site's patients.
        study: a study with privacy.
        noise_multiplier: sigma of the study's steps, above 0.
        random: of the coins, the sampling and the noise.
        rounds: of the study, from its first; 1 or more.
        canaries: patients whose coins are guessed, drawn at random, from ``FEWEST`` to all.
        guesses: numbers of guesses, each from 1 to ``canaries``; else ``usual_guesses``. The
            confidence is shared out among them.
        confidence: above 0 and below 1.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: an argument is outside its range.
        UpdateInvalid: see ``local_training.train_round``.
    """
    numbers = sorted(set(guesses or usual_guesses(canaries)), reverse=True)
    if not FEWEST <= canaries <= len(cohort.patients):
        raise ValueError("there are as many canaries as patients at most, and FEWEST at least")
    if not 1 <= numbers[-1] <= numbers[0] <= canaries:
        raise ValueError("a number of guesses lies from 1 to the number of canaries")
    if not 0 < confidence < 1:
        raise ValueError("the confidence must be above 0 and below 1")
    if not 1 <= rounds <= study.training.rounds:
        raise ValueError("the rounds are those of the study, from its first")
    order = random.shuffle(list(range(len(cohort.patients))))
    drawn, rest = order[:canaries], order[canaries:]
    coins = random.bernoulli(0.5, canaries)
    kept = [place for place, coin in zip(drawn, coins, strict=True) if coin]
    here = [cohort.patients[place] for place in sorted(kept + rest)]
    present = _Patients(cohort.images, here, cohort.targets)
    watch = _Adversary(cohort, drawn, rest, study)
    steps = rounds * study.training.steps_per_round
    plain = _plain(study)
    vector, module = flatten(module), copy.deepcopy(module)
    for step in range(steps):
        load(module, vector)
        number = step // study.training.steps_per_round + 1
        change = local_training.train_round(
            module,
            present,
            plain,
            noise_multiplier=noise_multiplier,
            random=random,
            round_number=number,
            steps=1,
        )
        watch.see(module, change, study.training.rate_of(number))
        vector = vector + change
        if progress is not None:
            progress(step + 1, steps)
    scores = watch.scores()
    right_first = (scores > 0) == coins
    ranked = right_first[np.argsort(-np.abs(scores), kind="stable")]
    share = 1 - (1 - confidence) / (_TESTS * len(numbers))
    delta = study.privacy.delta
    curve = curve_of(noise_multiplier, study.training.sampling_rate, steps)
    return OneRunAudit(
        claimed_epsilon=epsilon_pld(noise_multiplier, study.training.sampling_rate, steps, delta),
        noise_multiplier=noise_multiplier,
        sampling_rate=study.training.sampling_rate,
        delta=delta,
        confidence=confidence,
        steps=steps,
        others=len(rest),
        guesses=tuple(
            _judged(curve, canaries, made, int(ranked[:made].sum()), delta, share)
            for made in numbers
        ),
        scores=tuple(scores.tolist()),
        present=tuple(bool(coin) for coin in coins),
    )


def _judged(
    curve: Curve, canaries: int, made: int, right: int, delta: float, confidence: float
) -> Guesses:
    shown, most = (
        epsilon_lower(canaries, made, count, delta, confidence) for count in (right, made)
    )
    chance, least = (chance_of(curve, canaries, made, count) for count in (right, made))
    return Guesses(made, right, shown, most, chance, least)


def _plain(study: Study) -> Study:
    """The study in steps of plain gradient descent: a change of the weights shows a noised sum."""
    update = {"optimizer": "sgd", "momentum": 0.0, "steps": 1, "epochs": None}
    return study.model_copy(update={"training": study.training.model_copy(update=update)})


@dataclass(frozen=True)
class _Patients:
    """Some of a cohort's patients, over the same array of images: what is cached of it stays."""

    images: Images
    patients: Sequence[Patient]
    targets: NDArray[Any]


class _Adversary:
    """Knows all patients and sees every step; keeps what the least-squares estimate needs."""

    def __init__(
        self, cohort: Cohort, drawn: Sequence[int], rest: Sequence[int], study: Study
    ) -> None:
        self._cohort = cohort
        self._drawn, self._rest = (
            [cohort.patients[place] for place in who] for who in (drawn, rest)
        )
        self._study = study
        # It looks at images as they are: a fixed part of the network runs once for each.
        self._training = study.training.model_copy(update={"augment": False})
        self._gram: Matrix = np.zeros((len(drawn), len(drawn)))
        self._along: Matrix = np.zeros(len(drawn))
        self._energy = 0.0
        self._values = 0

    def see(self, module: nn.Module, change: NDArray[np.float32], rate: float) -> None:
        """Take in one step: the model before it, and how the step changed the weights."""
        trained, seen = local_training.trained_part(module, self._cohort, self._training)
        network = PatientGradSampleModule(trained, self._study.task)
        clip, rest = self._study.privacy.clipping_norm, np.zeros(len(change))
        many = max(1, min(_AT_ONCE[0], _AT_ONCE[1] // len(change)))
        try:
            own = np.empty((len(self._drawn), len(change)), np.float32)
            for start in range(0, len(self._drawn), many):
                some = self._drawn[start : start + many]
                own[start : start + len(some)] = self._clipped(network, seen, some, clip)
            for start in range(0, len(self._rest), many):
                some = self._rest[start : start + many]
                rest += self._clipped(network, seen, some, clip).sum(axis=0, dtype=np.float64)
        finally:
            network.to_standard_module()
        own *= self._training.sampling_rate
        noised = change.astype(np.float64) * -(self._training.expected_batch / (rate * clip))
        # Coins are 0 or 1: half of every canary is what to expect.
        excess = (
            noised - self._training.sampling_rate * rest - own.sum(axis=0, dtype=np.float64) / 2
        )
        for start in range(0, len(excess), _COLUMNS):
            # The estimate inverts this: float64, some columns at a time.
            some_values = own[:, start : start + _COLUMNS].astype(np.float64)
            self._gram += some_values @ some_values.T
            self._along += some_values @ excess[start : start + _COLUMNS]
        self._energy += float(excess @ excess)
        self._values += len(excess)

    def _clipped(
        self,
        network: PatientGradSampleModule,
        seen: Cohort | FeatureCohort,
        patients: Sequence[Patient],
        clip: float,
    ) -> NDArray[np.float32]:
        """``_clipped`` of these patients, each by the weight of the classes."""
        found, weights = _clipped(network, seen, patients, clip), self._study.class_weights
        if weights:
            of_class = np.asarray(weights, np.float32)
            each = [of_class[seen.targets[list(one.images)]].mean() for one in patients]
            found *= np.asarray(each, np.float32)[:, None]
        return found

    def scores(self) -> Matrix:
        """The estimate of each coin less a half."""
        powers, axes = np.linalg.eigh(self._gram)
        powers = np.maximum(powers, 0.0)
        along = axes.T @ self._along
        weights = 0.25 / (powers / 4 + self._noise(powers, along))
        estimate: Matrix = axes @ (weights * along)
        return estimate

    def _noise(self, powers: Matrix, along: Matrix) -> float:
        """The variance of the noise on one value that makes what was seen the most likely."""
        told = powers > powers.max(initial=0.0) * 1e-12
        powers, seen = powers[told], along[told] ** 2 / powers[told]
        left = max(self._energy - float(seen.sum()), 0.0)
        free = max(self._values - len(powers), 0)
        level = max(self._energy / self._values, 1e-30)
        likely, best = -math.inf, level
        for variance in np.geomspace(1e-12, 2.0, _NOISES) * level:
            spread = powers / 4 + variance
            value = -float((np.log(spread) + seen / spread).sum())
            value -= free * math.log(variance) + left / variance
            if value > likely:
                likely, best = value, float(variance)
        return best


def _clipped(
    network: PatientGradSampleModule,
    seen: Cohort | FeatureCohort,
    patients: Sequence[Patient],
    clip: float,
) -> NDArray[np.float32]:
    """Clipped gradients in units of ``clip``, (patients, size); what is not finite is zero."""
    bags = [Bag(np.asarray(one.images, dtype=np.int64)) for one in patients]
    network.fill_grad_samples(seen, bags)
    rows = torch.cat([p.grad_sample.flatten(start_dim=1) for p in network.trained], dim=1)  # type: ignore[attr-defined]
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    scaled = rows / torch.clamp(norms, min=clip).float()
    kept = torch.where(torch.isfinite(norms), scaled, torch.zeros(()))
    found: NDArray[np.float32] = kept.detach().numpy()
    return found
