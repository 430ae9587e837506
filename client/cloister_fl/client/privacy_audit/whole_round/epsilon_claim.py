"""Claim that noise, steps and rate keep a study within its epsilon, by an accountant of its own.

Privacy-loss distributions on a grid, composed by Fourier transform (Koskela, Jaelkoe, Honkela
2020), for adding and for removing a patient. It shares no code with ``privacy.accounting``, nor
with what that stands on. Losses are rounded to the nearest point of the grid, so the figure is
neither an upper nor a lower bound; it errs by less than ``ERROR``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence, normal_cdf
from cloister_fl.client.privacy_audit.whole_round.round_reference import steps_of
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study

ERROR = 0.02
_POINTS = 1 << 20
_REACH = 15.0
"""Standard deviations of the noise, and of the sum of losses, that are kept."""

Steps = tuple[float, float, int]
"""Noise multiplier, sampling rate, number of steps."""


def judge_epsilon(evidence: Evidence, where: str, study: Study) -> None:
    """Judge the noise that the installed code gives a study, by the study's own words."""
    used = charges(study)
    steps = study.training.rounds * steps_of(study)
    parts: list[Steps] = [(used.step.noise_multiplier, study.training.sampling_rate, steps)]
    if study.evaluation.release_epsilon > 0:
        sigma = used.release.noise_multiplier if used.release is not None else 0.0
        parts.append((sigma, 1.0, 1))
        alone = epsilon_of([(sigma, 1.0, 1)], study.privacy.delta)
        _require(evidence, f"the release, {where}", alone, study.evaluation.release_epsilon)
    whole = epsilon_of(parts, study.privacy.delta)
    _require(evidence, f"the study, {where}", whole, study.privacy.epsilon)


def _require(evidence: Evidence, what: str, found: float, claimed: float) -> None:
    detail = f"epsilon {found:.3f} where {claimed:g} is claimed"
    evidence.require(Claim.EPSILON, f"epsilon of {what}", found <= claimed + ERROR, detail)


def epsilon_of(parts: Sequence[Steps], delta: float) -> float:
    """Epsilon at ``delta`` of Poisson-subsampled Gaussian steps, add or remove one patient."""
    if any(not sigma > 0 for sigma, _, _ in parts):
        return math.inf
    return max(_one_way(parts, delta, adding) for adding in (False, True))


def _one_way(parts: Sequence[Steps], delta: float, adding: bool) -> float:
    moments = [_moments(sigma, rate, adding) for sigma, rate, _ in parts]
    mean = sum(steps * one[0] for (_, _, steps), one in zip(parts, moments, strict=True))
    spread = math.sqrt(sum(s * one[1] for (_, _, s), one in zip(parts, moments, strict=True)))
    widest = max(one[2] for one in moments)
    reach = abs(mean) + _REACH * spread + widest
    step = 2 * reach / _POINTS
    grid = np.asarray((np.arange(_POINTS) - _POINTS // 2) * step, np.float64)
    spectrum: NDArray[np.complex128] = np.ones(_POINTS // 2 + 1, np.complex128)
    for sigma, rate, steps in parts:
        masses = np.diff(_below(grid, step, sigma, rate, adding))
        spectrum *= np.fft.rfft(np.fft.ifftshift(masses)) ** steps
    masses = np.clip(np.fft.fftshift(np.fft.irfft(spectrum, _POINTS)), 0, None)

    def delta_at(epsilon: float) -> float:
        over = grid > epsilon
        return float(masses[over] @ -np.expm1(epsilon - grid[over]))

    low, high = 0.0, reach
    if delta_at(low) <= delta:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def _loss(places: NDArray[np.float64], sigma: float, rate: float) -> NDArray[np.float64]:
    """Log of the ratio of the densities with and without a patient whose clipped norm is 1."""
    tilt = (2 * places - 1) / (2 * sigma**2)
    found: NDArray[np.float64] = (
        tilt if rate == 1 else np.logaddexp(math.log1p(-rate), tilt + math.log(rate))
    )
    return found


def _moments(sigma: float, rate: float, adding: bool) -> tuple[float, float, float]:
    """Mean, variance and largest magnitude of a step's loss, roughly."""
    places = np.linspace(-_REACH * sigma, 1 + _REACH * sigma, 1 << 16)
    density = np.exp(-(places**2) / (2 * sigma**2))
    if not adding:
        density = (1 - rate) * density + rate * np.exp(-((places - 1) ** 2) / (2 * sigma**2))
    density /= density.sum()
    losses = _loss(places, sigma, rate) * (-1 if adding else 1)
    mean = float(density @ losses)
    return mean, float(density @ (losses - mean) ** 2), float(np.abs(losses).max())


def _below(
    grid: NDArray[np.float64], step: float, sigma: float, rate: float, adding: bool
) -> NDArray[np.float64]:
    """Chance of a loss below each edge between two points of the grid, (points + 1,)."""
    edges = np.append(grid - step / 2, grid[-1] + step / 2)
    # Where the loss, which rises with the value that is seen, is at an edge.
    losses = -edges if adding else edges
    if rate == 1:
        places = sigma**2 * losses + 0.5
    else:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # log(e^l - (1 - q)), without overflow.
            inside = losses + np.log1p(-(1 - rate) * np.exp(-losses))
        places = sigma**2 * (np.where(np.isnan(inside), -np.inf, inside) - math.log(rate)) + 0.5
    below = normal_cdf(places / sigma)
    if not adding:
        found: NDArray[np.float64] = (1 - rate) * below + rate * normal_cdf((places - 1) / sigma)
        return found
    return 1 - below
