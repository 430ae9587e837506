"""Cohort of a site: patients with pseudonyms, labels and pixels, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.data.feature_store import Features
from cloister_fl.client.data.images import Images, are_same, part_of
from cloister_fl.errors import Reject

_APART_LABEL = b"cloister/release/v1\0"


@dataclass(frozen=True)
class Unit:
    """What has a label of its own: an examination or an image of a patient, or the patient.

    Attributes:
        label: ``Task.label``: index into the strata, or ``UNLABELLED``.
        images: indices into ``Cohort.images``, at least one.
    """

    label: int
    images: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Patient:
    """One patient, the unit of privacy.

    Attributes:
        pseudonym: 64 hexadecimal digits; see ``site.folder.pseudonym``.
        label: ``Task.label``: index into the strata, or ``UNLABELLED``.
        images: indices into ``Cohort.images``, at least one.
        parts: the patient's units, where these are no patients; each image is in one.
        mark: 64 hexadecimal digits of the patient's first image. It orders patients: unlike the
            pseudonym it does not depend on the site's keys, so a study without privacy can be
            repeated to the bit in another site folder. It never leaves this process.
    """

    pseudonym: str
    label: int
    images: tuple[int, ...]
    mark: str = ""
    parts: tuple[Unit, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """What of the patient has a label of its own and is measured: ``Task.unit``."""
        return self.parts or (Unit(self.label, self.images),)


@dataclass(frozen=True, eq=False)
class Cohort:
    """Patients with their images.

    Attributes:
        images: shades of grey, uint16, shape (N, S, S), of volumes (N, D, S, S), in memory or
            where they are read from; a patient's images lie together.
        patients: sorted by mark.
        rejects: how many files were turned away, by reason.
        modalities: how many images were accepted, by modality.
        shapes: how many images were accepted, by stored (rows, columns) of a slice.
        targets: of the images, (N, ...), see ``Task``; empty where none were read.
        features: what a network's fixed part made of the images.

    Rejects, modalities and shapes describe the folder as it was read; ``split`` hands them on
    unchanged.
    """

    images: Images = field(repr=False)
    patients: tuple[Patient, ...] = field(repr=False)
    rejects: Mapping[Reject, int]
    modalities: Mapping[str, int]
    shapes: Mapping[tuple[int, int], int]
    targets: NDArray[Any] = field(default_factory=lambda: np.empty(0), repr=False)
    features: Features = field(default_factory=Features, repr=False)


def same(one: Cohort, other: Cohort) -> bool:
    """Whether two cohorts are of the same patients with the same targets and pixels."""
    return (
        one.patients == other.patients
        and are_same(one.images, other.images)
        and np.array_equal(one.targets, other.targets)
    )


def split(cohort: Cohort, fraction: float) -> tuple[Cohort, Cohort]:
    """Keep a share of the patients of each label (``Patient.label``) apart.

    A patient is on one side with all images. Who is kept apart depends on the images alone, so
    it is the same on every run, and a patient who comes or goes moves few others.

    Args:
        cohort: whom to divide.
        fraction: share of each label's patients to keep apart, from 0 up to but not including 1;
            rounded to whole patients, at least one of a label with two or more, and never all.

    Returns:
        The remaining cohort and the one kept apart.
    """
    if not 0 <= fraction < 1:
        raise ValueError("fraction lies from 0 up to but not including 1")
    apart: set[str] = set()
    for label in sorted({patient.label for patient in cohort.patients}):
        same = [patient for patient in cohort.patients if patient.label == label]
        same.sort(
            key=lambda one: hashlib.sha256(b"cloister/split/v1\0" + one.mark.encode()).digest()
        )
        names = [patient.pseudonym for patient in same]
        count = int(len(names) * fraction + 0.5)
        if fraction > 0:
            count = max(1, count)
        apart.update(names[: min(count, len(names) - 1)])
    return (
        subset(cohort, [one for one in cohort.patients if one.pseudonym not in apart]),
        subset(cohort, [one for one in cohort.patients if one.pseudonym in apart]),
    )


def subset(cohort: Cohort, patients: Sequence[Patient]) -> Cohort:
    """These patients of a cohort, in this order, with their images; possibly none."""
    kept = [index for patient in patients for index in patient.images]
    moved = {old: new for new, old in enumerate(kept)}
    places = np.asarray(kept, dtype=np.int64)
    return Cohort(
        images=part_of(cohort.images, places),
        targets=cohort.targets[places] if len(cohort.targets) else cohort.targets,
        patients=tuple(_moved(one, moved) for one in patients),
        rejects=cohort.rejects,
        modalities=cohort.modalities,
        shapes=cohort.shapes,
        features=cohort.features.part(),
    )


def _moved(patient: Patient, places: Mapping[int, int]) -> Patient:
    def there(images: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(places[index] for index in images)

    parts = tuple(replace(one, images=there(one.images)) for one in patient.parts)
    return replace(patient, images=there(patient.images), parts=parts)


def apart(pseudonym: str, fraction: float) -> bool:
    """Whether a patient is kept apart for the release: a coin of the patient's own.

    The coin is a hash of the pseudonym, which is keyed by the site and the study. Nobody else's
    coming or going moves the patient, so adding one patient changes one side only, by that one.

    Args:
        pseudonym: 64 hexadecimal digits.
        fraction: chance to be kept apart, 0 to 1.
    """
    digest = hashlib.sha256(_APART_LABEL + pseudonym.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2.0**64


def split_apart(cohort: Cohort, fraction: float) -> tuple[Cohort, Cohort]:
    """Whom to train on, and whom to keep apart for the release; either may be empty."""
    chosen = [apart(one.pseudonym, fraction) for one in cohort.patients]
    pairs = list(zip(cohort.patients, chosen, strict=True))
    return (
        subset(cohort, [one for one, yes in pairs if not yes]),
        subset(cohort, [one for one, yes in pairs if yes]),
    )
