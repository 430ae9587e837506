"""Noised evaluation: score histograms of a site's patients, noised before they leave the site.

A patient has one score a class, the mean over all images, and counts in one cell of each curve,
``cost.UNITS`` each; so one patient more or less moves the whole by ``cost.sensitivity``, L,
in L1, and by at most L in L2. The scores of a patient are computed from that patient's images
alone, in passes of their own: in a batch with others, rounding may depend on who else is there,
and a score at the edge of a bin would then move with another patient.

Each cell gets independent Gaussian noise of sigma L, rounded to whole units: the counts are whole,
so S + round(N) = round(S + N), which is post-processing of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable

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


def exact_histogram(module: nn.Module, cohort: Cohort, study: Study) -> Counts:
    """Scores of the patients, exact, (curves, 2, bins) in units: it must not leave like this.

    No model and no image raises here: a score that is not finite counts as 0, since a refusal that
    depends on data would be a release of its own.
    """
    seen: Cohort | FeatureCohort = cohort
    answer: Callable[[Tensor], Tensor] = module
    if isinstance(module, FixedFeatures):
        # Computed an image at a time, so they too are a function of the image alone.
        seen, answer = features_of(module, cohort), module.head
    device = next(module.parameters()).device
    table = np.zeros((study.curves, 2, RELEASE_BINS), np.int64)
    classes = [1] if study.outputs == 2 else range(study.outputs)
    was_training = module.training
    module.eval()
    for patient in cohort.patients:
        scores = _scores(answer, seen, patient.images, device)
        for curve, each in enumerate(classes):
            score = float(scores[each])
            cell = min(int(score * RELEASE_BINS), RELEASE_BINS - 1) if 0 <= score <= 1 else 0
            table[curve, int(patient.label == each), cell] += UNITS
    module.train(was_training)
    return table


def noised(table: Counts, study: Study, mechanism: Mechanism, random: SecureRandom) -> Counts:
    """Add the release's noise to every cell; the shape stays.

    Args:
        table: from ``exact_histogram``.
        study: whose sensitivity the noise is a multiple of.
        mechanism: of the release, see ``cost.release_mechanism``.
        random: the noise.
    """
    std = mechanism.noise_multiplier * sensitivity(study)
    noise = random.normal(table.size, std).round_().numpy().astype(np.int64)
    total: Counts = table + noise.reshape(table.shape)
    return total


def _scores(
    answer: Callable[[Tensor], Tensor],
    cohort: Cohort | FeatureCohort,
    images: tuple[int, ...],
    device: torch.device,
) -> NDArray[np.float64]:
    """Mean probability of each class over one patient's images, (K,)."""
    parts = []
    with torch.no_grad():
        batch = images_at_once(cohort, BATCH)
        for start in range(0, len(images), batch):
            indices = np.asarray(images[start : start + batch], np.int64)
            pixels = pixels_of(cohort, [Bag(0, indices, None)])
            logits = answer(pixels.to(device))
            parts.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
    mean: NDArray[np.float64] = np.concatenate(parts).mean(axis=0)
    return mean
