"""Cohorts of random images in memory, for tests of training; no file is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort


@dataclass(frozen=True)
class OnePatient:
    label: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Patients:
    images: NDArray[np.uint16]
    patients: tuple[OnePatient, ...] = ()


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
    return [Bag(p.label, np.array(p.images, dtype=np.int64)) for p in cohort.patients]
