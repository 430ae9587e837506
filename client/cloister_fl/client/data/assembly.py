"""Assembly of a cohort: images and their targets by patient, and by unit within each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cloister_fl.client.data.cohort import Cohort, Patient, Unit
from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.data.images import cache_of, gathered
from cloister_fl.client.data.labels.labelled_units import UnitKey, unit_of
from cloister_fl.client.data.targets import UNLABELLED, Targets
from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.errors import Reject
from cloister_fl.tasks import Task


def assembled(
    accepted: Sequence[tuple[Accepted, str]],
    targets: Targets | None,
    rejects: Mapping[Reject, int],
    task: Task,
) -> Cohort | None:
    """Order the images by patient and instance, whatever the folder's structure.

    Args:
        accepted: the images, each with its patient.
        targets: of the images; None where none were read.
        rejects: how many files were turned away, by reason.
        task: the study's.
    """
    if not accepted:
        return None
    by_patient: dict[str, list[int]] = {}
    for index, (_, name) in enumerate(accepted):
        by_patient.setdefault(name, []).append(index)
    marked = []
    for name, indices in by_patient.items():
        indices.sort(key=lambda index: accepted[index][0].keys.sop_instance)
        mark = accepted[indices[0]][0].image.digest.hex()
        marked.append((mark, name, indices))
    order: list[int] = []
    patients: list[Patient] = []
    for mark, name, indices in sorted(marked):
        label = UNLABELLED if targets is None else targets.label(task, indices)
        places = tuple(range(len(order), len(order) + len(indices)))
        parts: tuple[Unit, ...] = ()
        if targets is not None and task.unit != "patient":
            parts = _units(accepted, targets, task, indices, places)
        patients.append(Patient(name, label, places, mark, parts))
        order += indices
    stored = [accepted[index][0].image for index in order]
    return Cohort(
        images=gathered(stored),
        features=Features(Rows(disk=cache_of(stored))),
        targets=np.empty(0)
        if targets is None
        else task.stack([targets.records[index] for index in order]),
        patients=tuple(patients),
        rejects=rejects,
        modalities=dict(sorted(Counter(one.facts.modality for one, _ in accepted).items())),
        shapes=dict(
            sorted(Counter((one.facts.rows, one.facts.columns) for one, _ in accepted).items())
        ),
    )


def _units(
    accepted: Sequence[tuple[Accepted, str]],
    targets: Targets,
    task: Task,
    indices: Sequence[int],
    places: Sequence[int],
) -> tuple[Unit, ...]:
    """The units of one patient, in the order of their first images.

    Args:
        accepted, targets, task: see ``assembled``.
        indices: of the patient's images in ``accepted``.
        places: of the same in the cohort.
    """
    members: dict[UnitKey, list[tuple[int, int]]] = {}
    for index, place in zip(indices, places, strict=True):
        one, name = accepted[index]
        members.setdefault(unit_of(task.unit, name, one.keys), []).append((index, place))
    return tuple(
        Unit(targets.label(task, [index for index, _ in each]), tuple(place for _, place in each))
        for each in members.values()
    )
