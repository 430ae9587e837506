"""Noised evaluation: what a site's patients count for, noised before it leaves the site.

A patient counts ``Task.count``, in ``cost.UNITS``; one patient more or less moves the whole by at
most ``cost.sensitivity`` in L2. That is held here for any task: a count of a larger norm counts as
nothing, and it is a function of that patient's own images alone. They are passed through the
network without others: in a batch, rounding may depend on who else is there, and a score at the
edge of a bin would then move with another patient.

Each number gets independent Gaussian noise of sigma times the sensitivity, rounded to whole units:
the counts are whole, so S + round(N) = round(S + N), which is post-processing of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.evaluation import BATCH
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.sampling import Bag, FeatureCohort, images_at_once, pixels_of
from cloister_fl.networks.frozen_backbone import FixedFeatures
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.study.cost import RELEASE_BINS, UNITS, sensitivity
from cloister_fl.study.schema import Study
from cloister_fl.tasks import Task

_SLACK = 1e-9
"""Relative rounding of a norm in float64."""


def counts_in_units(module: nn.Module, cohort: Cohort, study: Study) -> Counts:
    """What the patients count for, exact, in units: it must not leave like this.

    No model and no image raises here: a refusal that depends on data would be a release.
    """
    task, most = study.task, sensitivity(study)
    seen: Cohort | FeatureCohort = cohort
    network: Callable[[Tensor], Tensor] = module
    if isinstance(module, FixedFeatures):
        # Computed an image at a time, so they too are a function of the image alone.
        seen, network = features_of(module, cohort), module.head
    device = next(module.parameters()).device
    total = np.zeros(task.counts_shape(RELEASE_BINS), np.int64)
    was_training = module.training
    module.eval()
    for patient in cohort.patients:
        answers = _answers(network, seen, patient.images, task, device)
        row = task.row(answers, cohort.targets[list(patient.images)])
        total += _bounded(UNITS * task.count(patient.label, row, RELEASE_BINS), most)
    module.train(was_training)
    return total


def _bounded(counts: Counts, most: float) -> Counts:
    norm = float(np.linalg.norm(counts.astype(np.float64)))
    return counts if norm <= most * (1 + _SLACK) else np.zeros_like(counts)


def noised(counts: Counts, study: Study, mechanism: Mechanism, random: SecureRandom) -> Counts:
    """Add the noise to every number; the shape stays.

    Args:
        counts: from ``counts_in_units``.
        study: whose sensitivity the noise is a multiple of.
        mechanism: of the release, see ``cost.release_mechanism``.
        random: the noise.
    """
    std = mechanism.noise_multiplier * sensitivity(study)
    noise = random.normal(counts.size, std).round_().numpy().astype(np.int64)
    total: Counts = counts + noise.reshape(counts.shape)
    return total


def _answers(
    network: Callable[[Tensor], Tensor],
    cohort: Cohort | FeatureCohort,
    images: tuple[int, ...],
    task: Task,
    device: torch.device,
) -> NDArray[Any]:
    """What the network says of one patient's images, (N, ...)."""
    parts = []
    with torch.no_grad():
        batch = images_at_once(cohort, BATCH)
        for start in range(0, len(images), batch):
            indices = np.asarray(images[start : start + batch], np.int64)
            pixels = pixels_of(cohort, [Bag(indices)])
            parts.append(task.answer(network(pixels.to(device))).cpu().numpy())
    return np.concatenate(parts)
