"""Evaluation: what a model answers for a cohort, and its figures, by patient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.training.sampling import Bag, FeatureCohort, images_at_once, pixels_of
from cloister_fl.metrics.classification import BINS
from cloister_fl.metrics.figures import Metrics
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.study.schema import Study
from cloister_fl.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

BATCH = 64
"""Images a forward pass; bounds memory, does not change an answer beyond rounding."""


def answers_for(module: nn.Module, cohort: Cohort, task: Task) -> npt.NDArray[Any]:
    """``Task.answer`` for each image, (N, ...), in the order of ``images``."""
    import torch

    from cloister_fl.client.training.feature_cache import features_of
    from cloister_fl.networks.frozen_backbone import FixedFeatures

    seen: Cohort | FeatureCohort = cohort
    network: Callable[[Tensor], Tensor] = module
    if isinstance(module, FixedFeatures):
        seen, network = features_of(module, cohort), module.head
    device = next(module.parameters()).device
    batch = images_at_once(cohort, BATCH)
    answers = []
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for start in range(0, len(cohort.images), batch):
            indices = np.arange(start, min(start + batch, len(cohort.images)))
            pixels = pixels_of(seen, [Bag(indices)])
            answers.append(task.answer(network(pixels.to(device))).cpu().numpy())
    module.train(was_training)
    return np.concatenate(answers)


def rows_of(
    module: nn.Module, cohort: Cohort, task: Task
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Labels (P,) and ``Task.row`` (P, R), one a patient."""
    answers = answers_for(module, cohort, task)
    labels = np.array([patient.label for patient in cohort.patients], np.int64)
    each = [list(patient.images) for patient in cohort.patients]
    rows = [task.row(answers[places], cohort.targets[places]) for places in each]
    return labels, np.array(rows)


def measured(module: nn.Module, cohort: Cohort, study: Study) -> Metrics:
    """The figures of the study's task, exact: of a cohort that belongs to no site."""
    return study.task.measure(*rows_of(module, cohort, study.task))


def exact_counts(module: nn.Module, cohort: Cohort, study: Study) -> Counts:
    """``Task.count`` summed over the patients, unnoised: for studies without privacy only."""
    task = study.task
    total = np.zeros(task.counts_shape(BINS), np.int64)
    for label, row in zip(*rows_of(module, cohort, task), strict=True):
        total += task.count(int(label), row, BINS)
    return total
