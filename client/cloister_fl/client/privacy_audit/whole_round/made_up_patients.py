"""Made-up patients of an audit: kinds of them, and cohorts that hold so many of each kind.

All patients of a kind have the same images and targets, so they have the same gradient, and how
many of them took part can be read off an update. A kind's images differ as much as images can,
noise from gratings, so that the gradients of two kinds point apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.study.schema import Study
from cloister_fl.tasks.task import LabelsFile

WHITE = 65535


@dataclass(frozen=True, eq=False)
class Kind:
    """Patients who are alike.

    Attributes:
        images: uint16 (n, S, S), of volumes (n, D, S, S), n of 1 or more.
        records: the target of each image, as ``Task.stack`` takes it.
        label: ``Task.label``.
    """

    images: NDArray[np.uint16]
    records: tuple[Any, ...]
    label: int


def kinds_of(
    study: Study,
    count: int,
    *,
    seed: int = 0,
    images: Sequence[int] = (1, 2, 3),
    flat: bool = False,
) -> list[Kind]:
    """Make ``count`` kinds; their labels take turns.

    Args:
        study: size of the images, and what a target is.
        count: 1 or more.
        seed: of the pixels, which are no secret.
        images: numbers of images, which take turns. Of more images than a step takes, all are
            the same, so that it does not matter which are drawn.
        flat: images of one shade of grey each, which no augmentation changes.
    """
    generator = np.random.default_rng(seed)
    made = []
    for place in range(count):
        number = images[place // 2 % len(images)]
        once = flat or number > study.training.images_per_patient
        drawn = [_image(study, generator, place, flat) for _ in range(1 if once else number)]
        pixels = np.stack(drawn * (number if once else 1))
        stratum = place % len(study.task.strata)
        records = tuple(_record(study, stratum, image) for image in pixels)
        made.append(Kind(pixels, records, study.task.label(records)))
    return made


def _image(
    study: Study, generator: np.random.Generator, place: int, flat: bool
) -> NDArray[np.uint16]:
    size, depth = study.input.size, study.input.depth
    shape = (size, size) if depth is None else (depth, size, size)
    if flat:
        return np.full(shape, generator.integers(WHITE + 1), np.uint16)
    if place % 4 < 2:
        return generator.integers(0, WHITE + 1, shape).astype(np.uint16)
    waves = np.zeros(shape)
    for axis in np.indices(shape):
        waves += generator.uniform(-3, 3) * axis
    return np.where(np.sin(waves + generator.uniform(0, 6)) > 0, WHITE, 0).astype(np.uint16)


def _record(study: Study, stratum: int, image: NDArray[np.uint16]) -> Any:
    task = study.task
    if isinstance(task.source, LabelsFile):
        return task.record([task.strata[stratum]] * len(task.source.columns))
    marked = image > (WHITE // 2 if stratum else WHITE)
    return marked.astype(np.uint8)


def cohort_of(study: Study, kinds: Sequence[Kind], counts: Sequence[int]) -> Cohort:
    """A cohort of so many patients of each kind, in the order of their pseudonyms."""
    everybody = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    names = [
        hashlib.sha256(f"audit\0{place}".encode()).hexdigest() for place in range(len(everybody))
    ]
    images: list[NDArray[np.uint16]] = []
    records: list[Any] = []
    patients = []
    for name, kind in sorted(zip(names, everybody, strict=True), key=lambda pair: pair[0]):
        places = tuple(range(len(records), len(records) + len(kind.images)))
        patients.append(Patient(name, kind.label, places, name))
        images.append(kind.images)
        records += kind.records
    size = study.input.size
    shape = (size, size) if study.input.depth is None else (study.input.depth, size, size)
    return Cohort(
        images=np.concatenate(images) if images else np.empty((0, *shape), np.uint16),
        targets=study.task.stack(records) if records else np.empty(0, np.int64),
        patients=tuple(patients),
        rejects={},
        modalities={study.input.modalities[0]: len(records)},
        shapes={(size, size): len(records)},
    )
