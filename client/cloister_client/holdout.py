"""What a coordinator measures a model with on a hold-out: the reading that a site trains with.

The server finds ``measure_on`` as the entry point ``measure`` of the group ``cloister.holdout`` and
imports nothing of the client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloister_client.cohort import load_cohort
from cloister_client.evaluation import measured
from cloister_client.policy import Policy
from cloister_client.site import init_site
from cloister_common import networks, vectors
from cloister_common.errors import DataError
from cloister_common.metrics import Metrics
from cloister_common.records import Vector
from cloister_common.study import Study


def measure_on(study: Study, folder: Path, out: Path) -> Callable[[Vector], Metrics]:
    """Read a hold-out once, as a site would, and return what measures a flat model on it.

    Args:
        study: what is trained.
        folder: holds ``dicom/`` and ``labels.csv``.
        out: the run's folder; a site folder ``holdout`` is made in it, with keys and a cache.

    Raises:
        DataError: the hold-out cannot be used.
    """
    folder = folder.absolute()
    site = init_site(
        out / "holdout",
        name="holdout",
        dicom=folder / "dicom",
        labels=folder / "labels.csv",
        policy=Policy(min_patients_per_class=1),
    )
    try:
        cohort = load_cohort(site, study)
    except DataError as error:
        raise type(error)(
            f"In the hold-out: {error.what}",
            why=error.why,
            remedy=f"{error.remedy} The hold-out is what --holdout names.",
        ) from None
    module = networks.build_for(study)

    def evaluate(model: Vector) -> Metrics:
        vectors.load(module, model)
        return measured(module, cohort, study)

    return evaluate
