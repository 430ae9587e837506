"""Local training of one round at a site, with patient-level differential privacy or without.

With privacy each step is the Poisson-subsampled Gaussian mechanism over patients: sample patients
with a public rate, one clipped gradient each, noise, a public divisor (De et al. 2022; for users
with several records, Charles et al. 2024). Whatever a local optimiser, momentum, Adam or the
proximal term of FedProx then makes of the noised gradient is post-processing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.dp_optimizer import PatientDPOptimizer
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.per_patient_gradients import (
    Engine,
    PatientGradSampleModule,
    Told,
)
from cloister_fl.client.training.sampling import (
    Bag,
    Cohort,
    FeatureCohort,
    SeededRandom,
    chunks,
    draw_bags,
    images_at_once,
    pixels_of,
    targets_of,
)
from cloister_fl.errors import InternalError, UpdateInvalid
from cloister_fl.networks.flat_parameters import Vector, check, flatten
from cloister_fl.networks.frozen_backbone import FixedFeatures
from cloister_fl.study.gradient_engines import REMEDY
from cloister_fl.study.schema import Study, Training

_IMAGES_AT_ONCE = 128
"""Most images in one pass that needs no gradients of its own for each patient."""


def train_round(
    module: nn.Module,
    cohort: Cohort,
    study: Study,
    *,
    noise_multiplier: float,
    random: SecureRandom | None,
    round_number: int,
    steps: int,
    site: str = "",
    told: Told | None = None,
) -> Vector:
    """Train a copy of the global model for one round.

    The ledger must have been charged for ``steps`` steps before this is called.

    Args:
        module: the global model, in training mode; it is not changed.
        cohort: the site's training patients.
        study: rate, divisor, optimiser, clipping norm and engine.
        noise_multiplier: sigma, above 0; not used where the study's privacy is off.
        random: where sampling and noise come from; not used where privacy is off.
        round_number: 1, 2, ...; the learning rate follows it, and where privacy is off, the
            sampling is keyed by it.
        steps: local steps, 1 or more.
        site: the site's name; keys the sampling where privacy is off.
        told: with privacy on, gets what fails for one patient, who then adds nothing to the step;
            without it, it is raised.

    Returns:
        New weights less old, float32, in the order of ``flat_parameters``.

    Raises:
        InternalError: privacy is on without noise or without a source of it, or with an engine
            that does not support its claim.
        UpdateInvalid: the new weights are not finite.
    """
    if steps < 1:
        raise InternalError("A round has 1 step or more.")
    unsound = study.unsound_engine
    if unsound:
        # The gate refuses such a study; this holds also where it was not asked.
        raise InternalError(
            "A study was to be trained whose privacy claim does not hold.",
            why=unsound,
            remedy=REMEDY,
        )
    before = flatten(module)
    local = copy.deepcopy(module).train()
    trained, seen = trained_part(local, cohort, study.training, told)
    optimizer = _optimizer(trained, study.training, round_number)
    if study.privacy.enabled:
        if not noise_multiplier > 0 or random is None:
            raise InternalError("A private study trains with noise from SecureRandom only.")
        _train_private(trained, optimizer, seen, study, noise_multiplier, random, steps, told)
    else:
        source = SeededRandom(study.training.seed, site, round_number)
        _train_open(trained, optimizer, seen, study, source, steps)
    try:
        delta: Vector = flatten(local) - before
        check(delta, len(before))
    except UpdateInvalid:
        raise UpdateInvalid(
            "Training produced weights that are not finite.",
            why="The learning rate is too large for the noise or for the model.",
            remedy="Lower training.learning_rate in the study.",
        ) from None
    return delta


def _train_private(
    module: nn.Module,
    inner: Optimizer,
    cohort: Cohort | FeatureCohort,
    study: Study,
    noise_multiplier: float,
    random: SecureRandom,
    steps: int,
    told: Told | None,
) -> None:
    training = study.training
    optimizer = PatientDPOptimizer(
        inner,
        noise_multiplier=noise_multiplier,
        max_grad_norm=study.privacy.clipping_norm,
        expected_batch_size=training.expected_batch,
        random=random,
    )
    pull = _Proximal(module, study.aggregation.proximal_mu)
    # Opacus calls the hook after the noise: the pull depends on public weights alone.
    optimizer.attach_step_hook(lambda _: pull.add())
    # ``train_round`` has refused any other.
    engine: Engine = "opacus" if training.engine == "opacus" else "patients"
    patients = PatientGradSampleModule(module, study.task, engine=engine, told=told)
    weights = study.class_weights
    try:
        for _ in range(steps):
            optimizer.step_on(patients.blocks(cohort, _draw(cohort, random, training), weights))
    finally:
        patients.to_standard_module()


def _train_open(
    module: nn.Module,
    optimizer: Optimizer,
    cohort: Cohort | FeatureCohort,
    study: Study,
    source: SeededRandom,
    steps: int,
) -> None:
    pull = _Proximal(module, study.aggregation.proximal_mu)
    for _ in range(steps):
        bags = _draw(cohort, source, study.training)
        total = sum(len(bag.images) for bag in bags)
        optimizer.zero_grad()
        for run in chunks(bags, images_at_once(cohort, _IMAGES_AT_ONCE)):
            targets = targets_of(study.task, cohort, run)
            losses = study.task.losses(module(pixels_of(cohort, run)), targets)
            if study.class_weights:
                # By constants, not by who is in the step: a site of one class keeps its weight.
                weights = torch.tensor(study.class_weights)
                losses = losses * (weights / weights.mean())[targets]
            torch.autograd.backward(losses.sum() / total)
        pull.add()
        optimizer.step()


class _Head(nn.Module):
    """The trainable part of a network whose first part is fixed; it takes features."""

    def __init__(self, network: FixedFeatures) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        return self.network.head(features)


def trained_part(
    local: nn.Module, cohort: Cohort, training: Training, told: Told | None = None
) -> tuple[nn.Module, Cohort | FeatureCohort]:
    """What is trained, and the cohort as it sees it: a fixed part runs once, not every step.

    Args:
        local: the network; what is returned shares its weights.
        cohort: the site's training patients.
        training: whether images are augmented; then a fixed part is no constant of an image.
        told: see ``features_of``.
    """
    if not isinstance(local, FixedFeatures) or training.augment:
        return local, cohort
    return _Head(local), features_of(local, cohort, told)


def _draw(
    cohort: Cohort | FeatureCohort, source: SecureRandom | SeededRandom, training: Training
) -> list[Bag]:
    return draw_bags(
        cohort,
        source,
        rate=training.sampling_rate,
        most=training.images_per_patient,
        augment=training.augment,
    )


def _optimizer(module: nn.Module, training: Training, round_number: int) -> Optimizer:
    rate = training.rate_of(round_number)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if training.optimizer == "adam":
        return Adam(weights, lr=rate)
    return SGD(weights, lr=rate, momentum=training.momentum)


class _Proximal:
    """FedProx (Li et al. 2020): pulls the local weights towards the global ones by mu."""

    def __init__(self, module: nn.Module, mu: float) -> None:
        self._mu = mu
        self._weights = [p for p in module.parameters() if p.requires_grad] if mu else []
        self._anchors: list[Tensor] = [weight.detach().clone() for weight in self._weights]

    def add(self) -> None:
        with torch.no_grad():
            for weight, anchor in zip(self._weights, self._anchors, strict=True):
                pull = self._mu * (weight - anchor)
                weight.grad = pull if weight.grad is None else weight.grad + pull


__all__ = ["Cohort", "Engine", "train_round", "trained_part"]
