"""Hold-out cohort of a coordinator, read as a site reads its training data.

The server finds ``measure_on`` as the entry point ``measure`` of the group
``cloister_fl.holdout`` and imports nothing of the client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training.evaluation import measured
from cloister_fl.errors import DataError
from cloister_fl.metrics.figures import Metrics
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study import study_network
from cloister_fl.study.schema import Study


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
        policy=Policy(
            min_patients=1,
            min_patients_per_class=1,
            min_patients_per_class_without_privacy=1,
        ),
        throwaway=True,
    )
    try:
        cohort = load_cohort(site, study)
    except DataError as error:
        raise error.kind(
            f"In the hold-out: {error.what}",
            why=error.why,
            remedy=f"{error.remedy} The hold-out is what was named (--holdout, holdout=).",
        ) from None
    module = study_network.build_for(study)

    def evaluate(model: Vector) -> Metrics:
        flat_parameters.load(module, model)
        return measured(module, cohort, study)

    return evaluate
