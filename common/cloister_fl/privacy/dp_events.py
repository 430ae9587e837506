"""Mechanisms that are charged: the Poisson-subsampled Gaussian and its number of steps.

The neighbouring relation is everywhere the same: one data set holds all that the other holds plus
one patient, with all of that patient's images (add or remove one patient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

MAX_NOISE = 1e6
"""Largest noise multiplier; beyond it the model would be noise, whatever the study."""


@dataclass(frozen=True, order=True, slots=True)
class Mechanism:
    """One noised step: each patient joins with a fixed chance, the clipped sum gets noise.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm, above 0 and at
            most 1e6 (``MAX_NOISE``).
        sampling_rate: chance of each patient to join, above 0 and at most 1.

    Raises:
        ValueError: a number is outside its range.
    """

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        if not (is_number(self.noise_multiplier) and 0 < self.noise_multiplier <= MAX_NOISE):
            raise ValueError(f"the noise multiplier must be above 0 and at most {MAX_NOISE:g}")
        if not (is_number(self.sampling_rate) and 0 < self.sampling_rate <= 1):
            raise ValueError("the sampling rate must be above 0 and at most 1")


Composition: TypeAlias = tuple[tuple[Mechanism, int], ...]
"""Mechanisms and their steps: pairs ``(Mechanism, steps)``, each mechanism once, in order, such as
``((Mechanism(noise_multiplier=1.1, sampling_rate=0.1), 200),)``. ``compose`` builds it."""


def compose(*parts: Composition) -> Composition:
    """Merge compositions; equal mechanisms add their steps, and none with 0 steps stays.

    Merging is more than tidiness: accountants slow down, or give up, with the number of distinct
    mechanisms, and hardly at all with the number of steps.

    Args:
        parts: each a sequence of pairs: a mechanism, and its steps, 0 or more.

    Raises:
        ValueError: it is something else.
    """
    total: dict[Mechanism, int] = {}
    for part in parts:
        for mechanism, steps in _pairs(part):
            if not (is_whole(steps) and steps >= 0):
                raise ValueError("steps must be a whole number that is not negative")
            total[mechanism] = total.get(mechanism, 0) + steps
    return tuple((mechanism, total[mechanism]) for mechanism in sorted(total) if total[mechanism])


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pairs(part: Any) -> Composition:
    try:
        pairs = tuple((mechanism, steps) for mechanism, steps in part)
    except (TypeError, ValueError):
        pairs = (("", 0),)
    if not all(isinstance(mechanism, Mechanism) for mechanism, _ in pairs):
        raise ValueError("a composition is a sequence of pairs (Mechanism, steps)")
    return pairs
