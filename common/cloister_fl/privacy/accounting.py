"""Privacy accounting: epsilon of a study with fixed parameters, and the noise that it needs.

The figure of record is Google's privacy-loss-distribution accountant (Doroshenko et al. 2022,
"Connect the Dots"; Koskela et al. 2020), rounded pessimistically: each number returned is an upper
bound. Renyi accounting (Mironov 2017; Mironov, Talwar, Zhang 2019) and Opacus' PRV accountant
(Gopi, Lee, Wutschitz 2021) are here to be compared with it. Opacus' GDP accountant is not: it is a
central-limit approximation that understates epsilon.

All of it is for add-or-remove-one neighbours; no function takes the size of a data set.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

from cloister_fl.errors import EpsilonUnreachable, PrivacyError
from cloister_fl.privacy.dp_events import (
    MAX_NOISE,
    Composition,
    Mechanism,
    compose,
    is_number,
    is_whole,
)
from cloister_fl.system.libraries.imports import undisturbed_imports

SMALLEST_DELTA = 1e-12
"""Below it the rounding errors of the Fourier transform would show; epsilon is then infinite."""

_LOST_A_STEP = 2.0**-51
"""Delta that rounding in the Fourier transform may take away, a step: see ``_lost``."""

SMALLEST_EPSILON = 1e-3
"""Below it the accountant's grid would be too fine to compute on."""

NOISE_DIGITS = 4
"""Decimals of a calibrated noise multiplier; it is always rounded up."""

_ANCHORS = 32
_FINEST = 2.0**-12
_POINTS = 8_000
_TOLERANCE = 1e-9
_MEANINGLESS = 20_000.0
_COARSE_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0, 256.0)


def epsilon_pld(sigma: float, q: float, steps: int, delta: float) -> float:
    """Upper bound on epsilon after ``steps`` Poisson-subsampled Gaussian steps.

    Args:
        sigma: noise multiplier, above 0.
        q: sampling rate, above 0 and at most 1.
        steps: number of steps, 0 or more.
        delta: above 0 and below 1.

    Returns:
        Epsilon, 0 or more; infinite for ``delta`` below 1e-12 (``SMALLEST_DELTA``), for one that
        rounding may halve (below 8.9e-16 times ``steps``, where q is below 1), and where Renyi
        accounting already says more than 20,000.

    Raises:
        ValueError: an argument is outside its range.
    """
    return epsilon_of(_single(sigma, q, steps), delta)


def epsilon_of(composition: Composition, delta: float) -> float:
    """``epsilon_pld`` for several mechanisms; all of them must be fixed beforehand."""
    _require_delta(delta)
    composition = compose(composition)
    if not composition:
        return 0.0
    if delta < SMALLEST_DELTA:
        return math.inf
    return _pld(composition, delta)


def deltas_pld(sigma: float, q: float, steps: int, epsilons: Sequence[float]) -> tuple[float, ...]:
    """Upper bounds on delta at each epsilon: what a number of steps claims as a whole.

    Args:
        sigma, q, steps: as of ``epsilon_pld``.
        epsilons: each 0 or more.

    Raises:
        ValueError: an argument is outside its range.
    """
    composition = _single(sigma, q, steps)
    if not all(is_number(one) and one >= 0 for one in epsilons):
        raise ValueError("each epsilon must be 0 or more")
    if not composition:
        return (0.0,) * len(epsilons)
    if q == 1:
        return tuple(_delta_gaussian(sigma / math.sqrt(steps), one) for one in epsilons)
    rough = _rough(composition, SMALLEST_DELTA)
    accountant = _accountant(composition, _interval(composition, min(rough, _MEANINGLESS)))
    lost = _lost(composition)
    return tuple(min(1.0, max(0.0, float(accountant.get_delta(one))) + lost) for one in epsilons)


def epsilon_rdp_of(composition: Composition, delta: float) -> float:
    """Epsilon by Renyi accounting; never below the true one, seldom below ``epsilon_of``."""
    _require_delta(delta)
    composition = compose(composition)
    return _rdp(composition, delta) if composition else 0.0


def epsilon_prv_of(composition: Composition, delta: float) -> float:
    """Epsilon by Opacus' PRV accountant, with an error of at most 0.01: a second opinion.

    Needs Opacus, which only sites have.
    """
    import numpy as np

    with undisturbed_imports():
        from opacus.accountants import PRVAccountant

    _require_delta(delta)
    accountant = PRVAccountant()
    accountant.history = [
        (mechanism.noise_multiplier, mechanism.sampling_rate, count)
        for mechanism, count in compose(composition)
    ]
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        # At full participation it takes the logarithm of 1 - q, which is minus infinity, rightly.
        # It bounds its grid by Renyi accounting and remarks on the orders, not on the result.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return float(accountant.get_epsilon(delta, eps_error=0.01))


def calibrate(
    epsilon: float, delta: float, q: float, steps: int, beside: Composition = ()
) -> float:
    """Smallest noise multiplier, in 4 decimals, whose ``epsilon_pld`` is at most ``epsilon``.

    Args:
        epsilon: the promise, above 0.
        delta: above 0 and below 1.
        q: sampling rate, above 0 and at most 1.
        steps: number of steps, 1 or more.
        beside: what is charged on top and has its noise already: epsilon is that of the whole.

    Raises:
        EpsilonUnreachable: no multiplier up to 1e6 (``MAX_NOISE``) keeps the promise, or delta is
            below 1e-12.
        ValueError: an argument is outside its range.
    """
    _require_delta(delta)
    if not (is_number(epsilon) and epsilon > 0):
        raise ValueError("epsilon must be above 0 and finite")
    if not (is_whole(steps) and steps >= 1):
        raise ValueError("there must be 1 step or more")
    _single(1.0, q, steps)  # judges both
    return _calibrated(epsilon, delta, q, steps, compose(beside))


@functools.lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, q: float, steps: int, beside: Composition) -> float:
    if delta < SMALLEST_DELTA:
        raise EpsilonUnreachable(
            f"Delta {delta:g} is too small to be accounted for.",
            why=f"The accountant's own precision ends at {SMALLEST_DELTA:g}.",
            remedy="Choose a delta of about 1 / (10 x the number of patients).",
        )
    if epsilon < SMALLEST_EPSILON:
        raise EpsilonUnreachable(
            f"Epsilon {epsilon:g} is too small to be accounted for.",
            why=f"The accountant's own precision ends at {SMALLEST_EPSILON:g}.",
            remedy=f"Choose an epsilon of {SMALLEST_EPSILON:g} or more.",
        )
    unit: int = 10**NOISE_DIGITS

    if q < 1 and not _is_precise(compose(_single(1.0, q, steps), beside), delta):
        raise EpsilonUnreachable(
            f"Delta {delta:g} is too small to be accounted for over {steps} steps.",
            why="Rounding adds up over the steps of an accountant; at a sampling rate below 1, "
            f"delta must be {2 * _LOST_A_STEP:.1e} times their number or more.",
            remedy="Ask for fewer steps, or choose a delta of about 1 / (10 x the number of "
            "patients).",
        )
    if epsilon_of(beside, delta) >= epsilon:
        raise EpsilonUnreachable(
            f"The noised evaluation uses all of epsilon {epsilon:g}.",
            why="Nothing is left for training.",
            remedy="Lower evaluation.release_epsilon, or raise privacy.epsilon in the study.",
        )

    def epsilon_at(ticks: int) -> float:
        return epsilon_of(compose(_single(ticks / unit, q, steps), beside), delta)

    # Search in ticks of the last decimal: the answer needs no rounding, and none can go wrong.
    high = math.ceil(_by_rdp(epsilon, delta, q, steps) * unit)
    while (above := epsilon_at(high)) > epsilon:
        high *= 2
        if high > MAX_NOISE * unit:
            raise _unreachable(epsilon, delta, q, steps)
    low, below = high, above
    while below <= epsilon and low > 1:
        high, above = low, below
        low = low * 7 // 8
        below = epsilon_at(low)
    if below <= epsilon:
        return low / unit
    last_fitted = True
    while high - low > 1:
        # Epsilon is close to a power of the noise; aim one tick past the root, so that both ends
        # of the bracket close in.
        middle = (low + high) // 2
        if high - low > 8 and math.isfinite(below) and above > 0:
            share = math.log(below / epsilon) / math.log(below / above)
            middle = round(low * (high / low) ** share) + (-1 if last_fitted else 1)
            middle = min(max(middle, low + 1), high - 1)
        value = epsilon_at(middle)
        last_fitted = value <= epsilon
        if last_fitted:
            high, above = middle, value
        else:
            low, below = middle, value
    return high / unit


def _by_rdp(epsilon: float, delta: float, q: float, steps: int) -> float:
    """Noise multiplier that Renyi accounting asks for: too much, but cheap and near."""
    if epsilon <= 1.5 * math.log(1 / delta) / (_COARSE_ORDERS[-1] - 1):
        # Renyi accounting says nothing of less, whatever the noise, for it ends at some order. As
        # much as without sampling is enough: sampling only helps.
        import numpy as np
        from dp_accounting import get_sigma_gaussian

        # Both ends of its search may be minus infinity, rightly.
        with np.errstate(divide="ignore"):
            alone = float(get_sigma_gaussian(epsilon, delta, tol=_TOLERANCE))
        return min(alone * math.sqrt(steps), MAX_NOISE)
    low, high = 0.0, 0.0625
    while _rough(_single(high, q, steps), delta) > epsilon:
        low, high = high, high * 2
        if high > MAX_NOISE / 2:
            raise _unreachable(epsilon, delta, q, steps)
    while high - low > high / 512:
        middle = (low + high) / 2
        if _rough(_single(middle, q, steps), delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _unreachable(epsilon: float, delta: float, q: float, steps: int) -> PrivacyError:
    return EpsilonUnreachable(
        f"No noise up to {MAX_NOISE:g} times the clipping norm gives epsilon {epsilon:g}.",
        why=f"The study takes {steps} steps at sampling rate {q:g}, delta {delta:g}.",
        remedy="Ask for fewer steps, a lower sampling rate or a larger epsilon.",
    )


def epsilon_trajectory(
    sigma: float, q: float, steps_per_round: int, rounds: int, delta: float
) -> tuple[float, ...]:
    """Upper bounds on epsilon after rounds 1, 2, ... ``rounds``; never falling.

    The last entry is ``epsilon_pld`` of the whole. Where q is below 1, the others come from a
    coarser grid and from up to 32 rounds: a round between two of them shows the bound of the
    later one, so no entry understates.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not all(is_whole(one) and one >= 1 for one in (rounds, steps_per_round)):
        raise ValueError("there must be 1 round and 1 step a round, or more")
    _require_delta(delta)
    _single(sigma, q, steps_per_round)  # judges both
    return _trajectory(sigma, q, steps_per_round, rounds, delta)


@functools.lru_cache(maxsize=64)
def _trajectory(
    sigma: float, q: float, steps_per_round: int, rounds: int, delta: float
) -> tuple[float, ...]:
    last = epsilon_pld(sigma, q, rounds * steps_per_round, delta)
    if delta < SMALLEST_DELTA:
        return (math.inf,) * rounds
    # Epsilon grows roughly with the square root of the steps: even spacing of that root.
    count = rounds if q == 1 else min(rounds, _ANCHORS)
    anchors = {max(i + 1, round(rounds * ((i + 1) / count) ** 2)) for i in range(count)}
    if count == rounds:
        anchors = set(range(1, rounds + 1))
    trajectory: list[float] = []
    highest = 0.0
    for anchor in sorted(anchors):
        bound = _pld(_single(sigma, q, anchor * steps_per_round), delta, coarser=4)
        # Fewer steps never cost more than all of them, whatever the coarser grid says.
        highest = min(max(highest, bound), last)
        trajectory.extend([highest] * (anchor - len(trajectory)))
    trajectory[-1] = last
    return tuple(trajectory)


def rdp_of(composition: Composition, orders: tuple[float, ...]) -> tuple[float, ...]:
    """Renyi divergence of a composition at each order; adds up over its mechanisms.

    Source: Mironov, Talwar, Zhang 2019, section 3.3, as implemented by dp_accounting.
    """
    total = [0.0] * len(orders)
    for mechanism, steps in compose(composition):
        for index, value in enumerate(_rdp_of_step(mechanism, orders)):
            total[index] += steps * value
    return tuple(total)


@functools.lru_cache(maxsize=1024)
def _rdp_of_step(mechanism: Mechanism, orders: tuple[float, ...]) -> tuple[float, ...]:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(_event(mechanism, 1))
    return tuple(float(value) for value in accountant.rdp)


@functools.lru_cache(maxsize=1024)
def _rdp(composition: Composition, delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(None, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for mechanism, steps in composition:
        accountant.compose(_event(mechanism, steps))
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def _pld(composition: Composition, delta: float, coarser: int = 1) -> float:
    if all(mechanism.sampling_rate == 1 for mechanism, _ in composition):
        return _gaussian(composition, delta)
    rough = _rough(composition, delta)
    if rough > _MEANINGLESS:
        return math.inf
    interval = _interval(composition, rough)
    epsilon = _pld_on_grid(composition, delta, interval * coarser)
    # With little noise Renyi overstates many times over, and the grid came out too coarse.
    if math.isfinite(epsilon) and _interval(composition, epsilon) <= interval / 4:
        interval = _interval(composition, epsilon)
        epsilon = _pld_on_grid(composition, delta, interval * coarser)
    return epsilon


def _gaussian(composition: Composition, delta: float) -> float:
    """Full participation: Gaussians compose to one Gaussian, whose epsilon has a closed form.

    Source: Balle and Wang 2018, Theorem 8.
    """
    import numpy as np
    from dp_accounting import get_epsilon_gaussian

    noise = sum(steps / mechanism.noise_multiplier**2 for mechanism, steps in composition) ** -0.5
    with np.errstate(divide="ignore"):
        return float(get_epsilon_gaussian(noise, delta, tol=_TOLERANCE)) + _TOLERANCE


def _rough(composition: Composition, delta: float) -> float:
    divergences = rdp_of(composition, _COARSE_ORDERS)
    return min(
        divergence + math.log(1 / delta) / (order - 1)
        for order, divergence in zip(_COARSE_ORDERS, divergences, strict=True)
    )


def _delta_gaussian(sigma: float, epsilon: float) -> float:
    """Delta of one Gaussian at full participation; Balle and Wang 2018, Theorem 8."""
    half, offset = 0.5 / sigma, epsilon * sigma
    first = 0.5 * math.erfc((offset - half) / math.sqrt(2))
    # e^epsilon times a tail that is smaller still: beyond any float, the bound is the first term.
    second = 0.5 * math.erfc((offset + half) / math.sqrt(2))
    both = first - math.exp(epsilon) * second if epsilon < 700 else first
    # What rounding can have taken away.
    return min(1.0, max(0.0, both) + 1e-15 * (1 + first))


def _pld_on_grid(composition: Composition, delta: float, interval: float) -> float:
    import numpy as np

    if not _is_precise(composition, delta):
        return math.inf
    # With noise by the hundred thousand it takes the logarithm of 0, which is minus infinity.
    with np.errstate(divide="ignore"):
        return float(_accountant(composition, interval).get_epsilon(delta - _lost(composition)))


def _is_precise(composition: Composition, delta: float) -> bool:
    return _lost(composition) <= delta / 2


def _lost(composition: Composition) -> float:
    """Delta that the accountant may understate by, whatever its grid.

    It takes the transform of one step's loss to the power of T, which makes about T roundings of
    2^-53 of each frequency. Close to full participation, where delta has a closed form, up to
    0.2 T 2^-53 was missing for T up to 3 million; at T = 200,000 and delta 1e-12, that was a
    fortieth of epsilon. Here it is 4 T 2^-53, and a little for what does not grow with T.
    """
    return _LOST_A_STEP * (16 + sum(steps for _, steps in composition))


def _accountant(composition: Composition, interval: float) -> Any:
    import dp_accounting
    import numpy as np
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=interval,
    )
    # With noise by the hundred thousand it takes the logarithm of 0, which is minus infinity.
    with np.errstate(divide="ignore"):
        for mechanism, steps in composition:
            accountant.compose(_event(mechanism, steps))
    return accountant


def _event(mechanism: Mechanism, steps: int) -> Any:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    if mechanism.sampling_rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_rate, event)
    return dp_accounting.SelfComposedDpEvent(event, steps)


def _interval(composition: Composition, epsilon: float) -> float:
    """Grid of the privacy loss: fine enough to be tight, coarse enough to be quick.

    The bound holds for every grid; rounding inflates the variance of the loss by about interval^2
    a step, so the grid follows the loss of one step (about epsilon / sqrt(steps)) and is at most
    2^-12 where that is affordable: about 8,000 points from the middle to an end of the range. The
    excess is then about 1e-4 of epsilon. A power of two, so that near-by noise multipliers share
    a grid and calibration sees a smooth function.
    """
    steps = sum(count for _, count in composition)
    # Ten standard deviations of one step's loss on either side, as the accountant keeps them.
    widest = max(20 / m.noise_multiplier + 1 / m.noise_multiplier**2 for m, _ in composition)
    wanted = min(_FINEST, max(epsilon, 1e-6) / (64 * math.sqrt(steps)))
    affordable = max(epsilon, widest / 2) / _POINTS
    return 2.0 ** math.floor(math.log2(max(wanted, affordable)))


def _single(sigma: float, q: float, steps: int) -> Composition:
    return compose(((Mechanism(sigma, q), steps),))


def _require_delta(delta: float) -> None:
    if not (is_number(delta) and 0 < delta < 1):
        raise ValueError("delta must be above 0 and below 1")
