"""Timing of one patient of a study on this machine: the study's network on random numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from cloister_fl.networks.flat_parameters import layout_of
from cloister_fl.networks.frozen_backbone import FixedFeatures
from cloister_fl.planning.plan import Pace
from cloister_fl.study import study_network
from cloister_fl.study.schema import Study

_UNITS = 5
_ENOUGH = 2.0
"""Seconds after which no further unit is timed."""


def measure(study: Study) -> tuple[Pace, int]:
    """Time the gradient of single patients, each with the study's images a patient.

    One patient after the other, as the engine ``patients`` goes about a large network; other
    engines, and small networks side by side, are faster. Reading, clipping and noise come on top.

    Returns:
        What one patient takes, the median of a few, and the number of trained weights.

    Raises:
        NetworkUnfit, ExtraMissing: see ``registry.build``.
    """
    module = study_network.build_for(study)
    side, count = study.input.size, study.training.images_per_patient
    places = (side, side) if study.input.depth is None else (study.input.depth, side, side)
    images = torch.randn((count, 1, *places), generator=torch.Generator().manual_seed(0))
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    once = 0.0
    part: Callable[[torch.Tensor], torch.Tensor] = module
    if isinstance(module, FixedFeatures) and not study.training.augment:
        # The fixed part runs once for each patient, and not in every step. A site keeps what a
        # pretrained backbone gave, and does the cheap filters again each round.
        fixed = module
        with torch.no_grad():
            once = _median(lambda: fixed.features(images))
            images = fixed.features(images)
        part = fixed.head
    task = study.task
    targets = task.example(images)

    def gradient() -> None:
        torch.autograd.grad(task.losses(part(images), targets).mean(), weights)

    return Pace(_median(gradient), once), layout_of(module).size


def _median(act: Callable[[], object]) -> float:
    act()  # The first one also allocates.
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < _UNITS and (not seconds or time.perf_counter() - began < _ENOUGH):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
