"""Secure-aggregation sessions of a study: the same at every site and the server.

A study's round has two sums at most: the updates, and the score histograms of the sites' own
patients: where privacy is off and no hold-out is used, or in the study's noised evaluation. Each
is a session of its own, with a number of its own, so that one hospital's absence from one says
nothing about the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cloister_fl.metrics.classification import BINS
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.secagg import Session, model_hash
from cloister_fl.study.cost import RELEASE_BINS
from cloister_fl.study.schema import Study

SUMS_A_ROUND = 2
"""A round's sums have numbers of their own: a multiple of this for its updates, one more for its
histograms."""
COUNT_BOUND = 2.0**19
"""Most that one bin of a site's histogram holds, in patients, or parts of them (``cost.UNITS``);
whole numbers up to it are summed exactly."""


def update_session(
    study: Study,
    invited: Sequence[str],
    *,
    round_number: int,
    attempt: int,
    model: Vector,
) -> Session:
    """Return the session that sums a round's updates.

    Args:
        study: the approved study.
        invited: ids of the invited sites, rising.
        round_number: 1-based.
        attempt: number of the attempt at this sum, from 0.
        model: the global model as it was received, (D,).
    """
    return Session(
        round=SUMS_A_ROUND * round_number,
        attempt=attempt,
        model=model_hash(_bytes(model)),
        dimension=model.size,
        clip=study.aggregation.clip,
        weights=tuple((site, study.aggregation.weight(site)) for site in invited),
    )


def histogram_session(
    study: Study, invited: Sequence[str], *, round_number: int, attempt: int, model: Vector
) -> Session:
    """The sum of the score histograms of the model after a round; patients count alike.

    A noised histogram is in units of ``cost.UNITS`` to a patient, and cut to the bound; an exact
    one is in ``cost.open_units``.
    """
    return Session(
        round=SUMS_A_ROUND * round_number + 1,
        attempt=attempt,
        model=model_hash(_bytes(model)),
        dimension=math.prod(counts_shape(study)),
        clip=COUNT_BOUND,
        weights=tuple((site, 1.0) for site in invited),
    )


def counts_shape(study: Study) -> tuple[int, ...]:
    """Shape of what an evaluation counts; see ``Task.count``."""
    return study.task.counts_shape(bins(study))


def bins(study: Study) -> int:
    """Bins of a score: few where they are noised."""
    return RELEASE_BINS if study.privacy.enabled else BINS


def _bytes(model: Vector) -> memoryview:
    """The model's bytes; a view, for a copy would double a large model for one hash."""
    return np.ascontiguousarray(model, "<f4").data.cast("B")
