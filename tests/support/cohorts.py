"""Cohorts of random images in memory, for tests of training; no file is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort
from cloister_fl.tasks.classification import Classification


@dataclass(frozen=True)
class OnePatient:
    label: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Patients:
    images: NDArray[np.uint16]
    patients: tuple[OnePatient, ...] = ()

    @property
    def targets(self) -> NDArray[np.int64]:
        return targets_by(self.patients)


TASK = Classification("finding", ("normal", "nodule"))
"""What these cohorts are about."""


class _Labelled(Protocol):
    @property
    def label(self) -> int: ...

    @property
    def images(self) -> tuple[int, ...]: ...


def targets_by(patients: Iterable[_Labelled]) -> NDArray[np.int64]:
    """The class of each image: its patient's; 0 where no patient has it."""
    label_of = {image: patient.label for patient in patients for image in patient.images}
    return np.array(
        [label_of.get(image, 0) for image in range(max(label_of, default=-1) + 1)], np.int64
    )


def patients_of(counts: Iterable[int]) -> tuple[OnePatient, ...]:
    """A patient for each of ``counts``, with as many images; the labels take turns."""
    ends = np.cumsum([0, *counts])
    return tuple(
        OnePatient(index % 2, tuple(range(ends[index], ends[index + 1])))
        for index in range(len(ends) - 1)
    )


def cohort_of(counts: Iterable[int], size: int = 16, seed: int = 0) -> Patients:
    """``patients_of(counts)`` with 16-bit noise of ``size`` pixels a side."""
    counts = list(counts)
    pixels = np.random.default_rng(seed).integers(0, 65536, (sum(counts), size, size))
    return Patients(pixels.astype(np.uint16), patients_of(counts))


def every_bag(cohort: Cohort | FeatureCohort) -> list[Bag]:
    """One bag a patient, of all the patient's images."""
    return [Bag(np.array(p.images, dtype=np.int64)) for p in cohort.patients]
