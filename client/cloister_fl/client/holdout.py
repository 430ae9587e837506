"""Hold-out cohort of a coordinator, read as a site reads its training data.

The server finds ``read_holdout`` as the entry point ``read`` of the group ``cloister_fl.holdout``
and imports nothing of the client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.client.data.cohort import Patient
from cloister_fl.client.data.loading import read_cohort, require_sound
from cloister_fl.client.dicom.facts import Facts, band_of
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
_LONGEST = 60
"""Characters of a maker's name that are shown; DICOM allows 64."""
_SEVERAL = "several"


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
        reading = read_cohort(site, study)
        cohort = require_sound(reading)
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

    facts: dict[str, list[Facts]] = {}
    for told, name in reading.facts:
        facts.setdefault(name, []).append(told)
    patients = tuple(_patient(one, facts[one.pseudonym]) for one in cohort.patients)
    return Holdout(study.task, patients, score)


def _patient(one: Patient, facts: Sequence[Facts]) -> HoldoutPatient:
    """Named by a hash of an image, so that two runs call a patient the same and divide alike.

    Of the image as it is stored: what a study makes of it has no say. Of volumes, as the study
    makes them.
    """
    mark = min(told.pixels for told in facts)
    name = hashlib.sha256(_NAME_LABEL + mark.encode()).hexdigest()[:16]
    units = tuple(HoldoutUnit(unit.label, len(unit.images)) for unit in one.units)
    return HoldoutPatient(name, one.label, units, mark, _groups(facts))


def _groups(facts: Sequence[Facts]) -> dict[str, str]:
    """The groups of a patient, as the images say; none of a kind where they are silent on it.

    Images that contradict each other on the sex say none. The age is that of the earliest image.
    """
    sexes = {one.sex for one in facts if one.sex}
    ages = [int(one.age) for one in facts if one.age]
    # Devices of one maker differ in case and spaces.
    makers = {" ".join(one.manufacturer.split()).upper()[:_LONGEST] for one in facts} - {""}
    told = {
        "age": band_of(min(ages)) if ages else "",
        "maker": _SEVERAL if len(makers) > 1 else "".join(makers),
        "sex": "".join(sexes) if len(sexes) == 1 else "",
    }
    return {kind: name for kind, name in told.items() if name}
