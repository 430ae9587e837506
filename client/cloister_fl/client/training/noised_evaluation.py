"""Noised evaluation: what a site's patients count for, noised before it leaves the site.

A patient counts ``Task.count``, in ``cost.UNITS``; one patient more or less moves the whole by at
most ``cost.sensitivity`` in L2. A patient with n examinations or images that have labels of their
own counts ``floor(UNITS / n)`` for each, so n times that is ``UNITS`` at most, whatever n is; above
``UNITS`` it is nothing. That is held here for any task: a count of a larger norm counts as
nothing, and it is a function of that patient's own images alone. They are passed through the
network without others: in a batch, rounding may depend on who else is there, and a score at the
edge of a bin would then move with another patient.

Each number gets independent Gaussian noise of sigma times the sensitivity, rounded to whole units:
the counts are whole, so S + round(N) = round(S + N), which is post-processing of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.evaluation import Answering, answering
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.protocol.round_messages import Counts
from cloister_fl.study.cost import RELEASE_BINS, UNITS, sensitivity
from cloister_fl.study.schema import Study
from cloister_fl.tasks import Task

_SLACK = 1e-9
"""Relative rounding of a norm in float64."""


def counts_in_units(
    module: nn.Module, cohort: Cohort, study: Study, told: Callable[[Exception], None] | None = None
) -> Counts:
    """What the patients count for, exact, in units: it must not leave like this.

    No model and no image raises here: a refusal that depends on data would be a release.

    Args:
        module: the model to measure.
        cohort: who is kept apart.
        study: its task and sensitivity.
        told: gets what fails for one patient, who then counts as nothing; else it is raised.
    """
    task, most = study.task, sensitivity(study)
    total = np.zeros(task.counts_shape(RELEASE_BINS), np.int64)
    with answering(module, cohort, task, told) as answer:
        for patient in cohort.patients:
            # A pass of the patient's own, and not one with others.
            try:
                total += _of_patient(patient, cohort, task, answer, most)
            except Exception as error:
                if told is None:
                    raise
                told(error)
    return total


def _of_patient(
    patient: Patient, cohort: Cohort, task: Task, answer: Answering, most: float
) -> Counts:
    """What one patient counts for, in units: by the triangle inequality, ``most`` in L2."""
    whole = np.zeros(task.counts_shape(RELEASE_BINS), np.int64)
    share = UNITS // len(patient.units)
    for unit in patient.units if share else ():
        row = task.row(answer(unit.images), cohort.targets[list(unit.images)])
        whole += share * _bounded(task.count(unit.label, row, RELEASE_BINS), whole.shape, most)
    return whole


def _bounded(counted: object, shape: tuple[int, ...], most: float) -> Counts:
    """The counts of one unit; nothing where they are not what the task promises.

    Another shape would be spread over the whole table where it is added, and other numbers than
    int64 would raise, or round, after the bound was taken.
    """
    nothing: Counts = np.zeros(shape, np.int64)
    if not isinstance(counted, np.ndarray) or counted.dtype != np.int64 or counted.shape != shape:
        return nothing
    # In float64: whole numbers that wrap when they are multiplied are far beyond any bound.
    norm = UNITS * float(np.linalg.norm(counted.astype(np.float64)))
    return counted if norm <= most * (1 + _SLACK) else nothing


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
