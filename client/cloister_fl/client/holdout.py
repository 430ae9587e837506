"""Hold-out cohort of a coordinator, read as a site reads its training data.

The server finds ``read_holdout`` as the entry point ``read`` of the group ``cloister_fl.holdout``
and imports nothing of the client.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.client.data.cohort import Patient
from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training.evaluation import rows_of
from cloister_fl.errors import DataError
from cloister_fl.networks import flat_parameters
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study import study_network
from cloister_fl.study.schema import Study
from cloister_fl.tasks.divided_holdout import Holdout, HoldoutPatient, HoldoutUnit

if TYPE_CHECKING:
    from cloister_fl.tasks.task import Floats

_NAME_LABEL = b"cloister/holdout-name/v1\0"


def read_holdout(study: Study, folder: Path, out: Path) -> Holdout:
    """Read a hold-out once, as a site would.

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

    def score(model: Vector) -> Floats:
        flat_parameters.load(module, model)
        return rows_of(module, cohort, study.task)[1]

    return Holdout(study.task, tuple(_patient(one) for one in cohort.patients), score)


def _patient(one: Patient) -> HoldoutPatient:
    """Named by a hash of the images, so that two runs call a patient the same."""
    name = hashlib.sha256(_NAME_LABEL + one.mark.encode()).hexdigest()[:16]
    units = tuple(HoldoutUnit(unit.label, len(unit.images)) for unit in one.units)
    return HoldoutPatient(name, one.label, units, one.mark)
