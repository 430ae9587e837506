"""Evaluation: what a model answers for a cohort, and its figures, by unit (``Task.unit``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.training.sampling import Bag, FeatureCohort, images_at_once, pixels_of
from cloister_fl.metrics.classification import BINS
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.study.cost import open_units
from cloister_fl.study.schema import Study
from cloister_fl.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

Answering: TypeAlias = Callable[[Sequence[int]], npt.NDArray[Any]]
"""From places in a cohort's images, one or more, to what a network answers for them."""

BATCH = 64
"""Images a forward pass; bounds memory, does not change an answer beyond rounding."""


@contextmanager
def answering(
    module: nn.Module,
    cohort: Cohort,
    task: Task,
    told: Callable[[Exception], None] | None = None,
) -> Iterator[Answering]:
    """Give what answers for the images at some places of a cohort: ``Task.answer``, (N, ...).

    The network's mode is as before afterwards.

    Args:
        module, cohort, task: whose answers.
        told: see ``features_of``.
    """
    import torch

    from cloister_fl.client.training.feature_cache import features_of
    from cloister_fl.networks.frozen_backbone import FixedFeatures

    seen: Cohort | FeatureCohort = cohort
    network: Callable[[Tensor], Tensor] = module
    if isinstance(module, FixedFeatures):
        # Computed an image at a time, so they are a function of the image alone.
        seen, network = features_of(module, cohort, told), module.head
    device = next(module.parameters()).device
    batch = images_at_once(cohort, BATCH)

    def answer(places: Sequence[int]) -> npt.NDArray[Any]:
        parts = []
        with torch.no_grad():
            for start in range(0, len(places), batch):
                bag = Bag(np.asarray(places[start : start + batch], np.int64))
                logits = network(pixels_of(seen, [bag]).to(device))
                parts.append(task.answer(logits).cpu().numpy())
        return np.concatenate(parts)

    was_training = module.training
    module.eval()
    try:
        yield answer
    finally:
        module.train(was_training)


def answers_for(module: nn.Module, cohort: Cohort, task: Task) -> npt.NDArray[Any]:
    """``Task.answer`` for each image, (N, ...), in the order of ``images``."""
    with answering(module, cohort, task) as answer:
        return answer(range(len(cohort.images)))


def rows_of(
    module: nn.Module, cohort: Cohort, task: Task
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Labels (U,) and ``Task.row`` (U, R), one a unit, and (U,) the place of its patient."""
    answers = answers_for(module, cohort, task)
    units = [(place, one) for place, patient in enumerate(cohort.patients) for one in patient.units]
    each = [list(one.images) for _, one in units]
    rows = [task.row(answers[places], cohort.targets[places]) for places in each]
    labels = np.array([one.label for _, one in units], np.int64)
    return labels, np.array(rows), np.array([place for place, _ in units], np.int64)


def exact_counts(module: nn.Module, cohort: Cohort, study: Study) -> Counts:
    """``Task.count`` summed over the patients, unnoised: for studies without privacy only.

    In ``cost.open_units``: where a patient has n units, each adds an n-th, rounded down.
    """
    task, whole = study.task, open_units(study)
    total = np.zeros(task.counts_shape(BINS), np.int64)
    if not cohort.patients:
        # A site with one patient of each class keeps nobody apart.
        return total
    for label, row, place in zip(*rows_of(module, cohort, task), strict=True):
        share = whole // len(cohort.patients[int(place)].units)
        total += share * task.count(int(label), row, BINS)
    return total
