"""Poisson sampling of patients and their images, and the tensors made of them.

Everything random about one patient is drawn for that patient alone ("inside the unit"), so that a
patient contributes one gradient, whatever the number of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_fl.client.data.images import Images
from cloister_fl.client.training.csprng import Source, bernoulli_from
from cloister_fl.tasks import Task

PixelT = TypeVar("PixelT", np.uint8, np.uint16)

_SHIFT = 16
"""An augmented image is moved by at most 1/16 of its side in each direction."""


class Patient(Protocol):
    """One patient of a cohort: the places of the images."""

    @property
    def images(self) -> tuple[int, ...]: ...


class Cohort(Protocol):
    """A site's patients: images uint16 (N, S, S) or (N, D, S, S), from 0 (black) to 65535, and
    their targets (N, ...), see ``Task``."""

    @property
    def images(self) -> Images: ...

    @property
    def targets(self) -> NDArray[Any]: ...

    @property
    def patients(self) -> Sequence[Patient]: ...


@dataclass(frozen=True)
class Bag:
    """The images of one sampled patient, not yet read.

    Attributes:
        images: places in the cohort's array, at least one.
        moves: int64 (images, 3) of mirrored (0 or 1), rows down, columns right; None for as is.
    """

    images: NDArray[np.int64]
    moves: NDArray[np.int64] | None = None


class SeededRandom:
    """A source that can be repeated, for studies without privacy: simulations must be.

    Philox, keyed by SHA-256 over seed, site and round. It is no source of noise: the privatised
    optimiser takes none but ``SecureRandom``.
    """

    def __init__(self, seed: int, site: str, round_number: int) -> None:
        form = f"cloister/sampling/v1\0{seed}\0{round_number}\0{site}".encode()
        key = int.from_bytes(hashlib.sha256(form).digest()[:16], "big")
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def words(self, n: int) -> NDArray[np.uint64]:
        return self._generator.integers(0, 2**64, n, dtype=np.uint64)

    def bernoulli(self, q: float, n: int) -> NDArray[np.bool_]:
        return bernoulli_from(self.words(n), q)

    def integers(self, high: int, n: int) -> NDArray[np.int64]:
        return self._generator.integers(0, high, n)


def draw_bags(
    cohort: Cohort | FeatureCohort, source: Source, *, rate: float, most: int, augment: bool
) -> list[Bag]:
    """Poisson-sample patients and draw their images.

    Args:
        cohort: the site's patients.
        source: ``SecureRandom`` where privacy is on.
        rate: chance of each patient to be drawn, above 0 and at most 1.
        most: at most so many images a patient, 1 or more, without repetition.
        augment: whether images are mirrored and moved at random.

    Returns:
        One bag a sampled patient, in the cohort's order; possibly none.
    """
    patients = cohort.patients
    drawn = np.flatnonzero(source.bernoulli(rate, len(patients)))
    side = cohort.images.shape[-1]
    bags: list[Bag] = []
    for index in drawn:
        patient = patients[int(index)]
        images = np.asarray(patient.images, dtype=np.int64)
        if len(images) > most:
            # Random keys, the smallest win: a uniform choice without repetition.
            keys = source.words(len(images))
            images = images[np.sort(np.argsort(keys, kind="stable")[:most])]
        if len(images):
            moves = _draw_moves(source, len(images), side) if augment else None
            bags.append(Bag(images, moves))
    return bags


def _draw_moves(source: Source, count: int, side: int) -> NDArray[np.int64]:
    reach = side // _SHIFT
    mirrored = source.integers(2, count)
    shifts = source.integers(2 * reach + 1, 2 * count) - reach
    return np.column_stack([mirrored, shifts.reshape(count, 2)])


@dataclass(frozen=True)
class FeatureCohort:
    """A cohort seen through the part of a network that is not trained.

    Attributes:
        images: float32 (N, channels, side, side): that part's answers, in the cohort's order.
        patients, targets: the cohort's.
    """

    images: NDArray[np.float32]
    patients: Sequence[Patient]
    targets: NDArray[Any]


def pixels_of(cohort: Cohort | FeatureCohort, bags: Sequence[Bag]) -> torch.Tensor:
    """Read the images of some bags, one after the other.

    Returns:
        float32 (images, 1, S, S), volumes (images, 1, D, S, S), from -2 (black) to 2 (white):
        (x / 65535 - 0.5) / 0.25; of a ``FeatureCohort``, its images as they are.
    """
    if isinstance(cohort, FeatureCohort):
        return _aligned(np.concatenate([cohort.images[bag.images] for bag in bags]))
    parts = [moved(cohort.images[bag.images], bag.moves) for bag in bags]
    stack = np.concatenate(parts).astype(np.float32)
    stack /= 65535.0
    stack -= 0.5
    stack /= 0.25
    return _aligned(stack).unsqueeze(1)


def _aligned(values: NDArray[Any]) -> torch.Tensor:
    """Copy to where torch puts its own: NumPy's memory begins where it happens to, and a matrix
    product may round in another way for it. A patient's gradient must not depend on that."""
    return torch.from_numpy(values).clone()


def targets_of(task: Task, cohort: Cohort | FeatureCohort, bags: Sequence[Bag]) -> torch.Tensor:
    """What the network should say of each image of some bags, one after the other: (images, ...),
    as ``Task.losses`` takes it; what has a place in the image is moved as the image is."""
    return torch.cat(
        [task.tensor(cohort.targets[bag.images], partial(moved, moves=bag.moves)) for bag in bags]
    )


def moved(images: NDArray[PixelT], moves: NDArray[np.int64] | None) -> NDArray[PixelT]:
    """Mirror and move each image; what comes in from outside repeats the edge.

    All slices of a volume move alike, each in its plane.
    """
    if moves is None:
        return images
    side = images.shape[-1]
    places = np.arange(side)
    rows = np.clip(places - moves[:, 1:2], 0, side - 1)
    columns = np.clip(places - moves[:, 2:3], 0, side - 1)
    columns = np.where(moves[:, :1] == 1, side - 1 - columns, columns)
    result = np.empty_like(images)
    for place, image in enumerate(images):
        result[place] = image[..., rows[place][:, None], columns[place][None, :]]
    return result


def images_at_once(cohort: Cohort | FeatureCohort, most: int) -> int:
    """How many images to take where ``most`` flat ones fit: a volume counts as its slices."""
    if isinstance(cohort, FeatureCohort) or cohort.images.ndim == 3:
        return most
    return max(1, most // int(cohort.images.shape[1]))


def chunks(bags: Sequence[Bag], most: int) -> Iterator[list[Bag]]:
    """Cut bags into runs of at most ``most`` images (or of one bag, where it alone has more)."""
    run: list[Bag] = []
    images = 0
    for bag in bags:
        if run and images + len(bag.images) > most:
            yield run
            run, images = [], 0
        run.append(bag)
        images += len(bag.images)
    if run:
        yield run
