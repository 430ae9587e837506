"""Evaluation: scores and segmentation masks of a model on a cohort, by patient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.training.sampling import Bag, FeatureCohort, images_at_once, pixels_of
from cloister_fl.metrics.classification import Metrics, histogram, measure, patient_scores
from cloister_fl.metrics.dice import coefficient, measure_dice
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.study.schema import Study

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 64
"""Images a forward pass; bounds memory, does not change a score beyond rounding."""


def image_scores(module: nn.Module, cohort: Cohort) -> npt.NDArray[np.float64]:
    """Probability of each class for each image: (N, K), rows in the order of ``images``."""
    import torch

    return _passed(module, cohort, lambda logits: torch.softmax(logits.double(), dim=1))


def segmentation_masks(module: nn.Module, cohort: Cohort) -> npt.NDArray[np.bool_]:
    """Pixels of each image that the model outlines: (N, S, S), in the order of ``images``."""
    return _passed(module, cohort, lambda logits: logits[:, 0] >= 0)


def _passed(
    module: nn.Module, cohort: Cohort, read: Callable[[Tensor], Tensor]
) -> npt.NDArray[Any]:
    import torch

    from cloister_fl.client.training.feature_cache import features_of
    from cloister_fl.networks.frozen_backbone import FixedFeatures

    seen: Cohort | FeatureCohort = cohort
    answer: Callable[[Tensor], Tensor] = module
    if isinstance(module, FixedFeatures):
        seen, answer = features_of(module, cohort), module.head
    device = next(module.parameters()).device
    batch = images_at_once(cohort, BATCH)
    answers = []
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for start in range(0, len(cohort.images), batch):
            indices = np.arange(start, min(start + batch, len(cohort.images)))
            pixels = pixels_of(seen, [Bag(0, indices, None)])
            answers.append(read(answer(pixels.to(device))).cpu().numpy())
    module.train(was_training)
    return np.concatenate(answers)


def cohort_scores(
    module: nn.Module, cohort: Cohort
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Labels (P,) and mean probabilities (P, K), one row a patient."""
    by_image = image_scores(module, cohort)
    owner = np.empty(len(cohort.images), np.int64)
    for position, patient in enumerate(cohort.patients):
        owner[list(patient.images)] = position
    labels = np.array([patient.label for patient in cohort.patients], np.int64)
    return labels, patient_scores(by_image, owner)


def cohort_dice(
    module: nn.Module, cohort: Cohort
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Whether anything is marked, (P,) 0 or 1, and the Dice coefficient, (P,), by patient."""
    assert cohort.masks is not None
    shown, marked = segmentation_masks(module, cohort), cohort.masks == 1
    labels = np.array([patient.label for patient in cohort.patients], np.int64)
    each = [list(patient.images) for patient in cohort.patients]
    return labels, np.array([coefficient(marked[places], shown[places]) for places in each])


def measured(module: nn.Module, cohort: Cohort, study: Study) -> Metrics:
    """The figures that the study's target asks for, exact: of a cohort that belongs to no site."""
    if study.target.segment:
        return measure_dice(*cohort_dice(module, cohort))
    return measure(*cohort_scores(module, cohort))


def score_histogram(module: nn.Module, cohort: Cohort, study: Study) -> Counts:
    """Patients by score, (curves, 2, bins): without and with the class.

    One curve for a binary target (the second class), else one a class against the rest. Of a
    segmentation, patients by Dice coefficient: without and with something marked. It is exact
    and unnoised: for studies without privacy only.
    """
    if study.target.segment:
        return histogram(*cohort_dice(module, cohort))[np.newaxis]
    labels, scores = cohort_scores(module, cohort)
    classes = [1] if study.outputs == 2 else range(study.outputs)
    return np.stack([histogram((labels == k).astype(np.int64), scores[:, k]) for k in classes])
