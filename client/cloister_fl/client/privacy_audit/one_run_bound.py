"""Lower bound on epsilon from right guesses: the arithmetic of the one-run audit.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023;
arXiv:2305.08846), Theorem 5.2 and Appendix D. Each of m canaries is in the data by a fair coin of
its own; whoever sees what the training gives off guesses r of the coins. If the training is
(epsilon, delta)-DP for adding or removing one canary, then, with W ~ Binomial(r, 1/(1+e^-epsilon)),

    P[v or more right] <= P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i.

Which coins are guessed may depend on all that is seen; their number r may not.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_PRECISION = 1e-6


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on the chance of so many right guesses if the training is (epsilon, delta)-DP.

    Args:
        canaries: m, 1 or more.
        guesses: r, from 1 to ``canaries``.
        right: v, from 0 to ``guesses``.
        epsilon: 0 or more.
        delta: from 0 up to but not including 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise ValueError("there are 0 <= right <= guesses <= canaries, and a guess at least")
    if not (math.isfinite(epsilon) and epsilon >= 0 and 0 <= delta < 1):
        raise ValueError("epsilon is 0 or more, delta from 0 up to but not including 1")
    chances = _binomial(guesses, epsilon)
    tail = math.fsum(chances[right:])
    # P[v > W >= v - i] for i = 1, ..., v; a larger i adds nothing.
    below = np.cumsum(chances[:right][::-1])
    steepest = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * steepest)


def epsilon_lower(
    canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """Lower bound on epsilon at ``delta``; 0 where the guesses show nothing.

    Whatever training gives off, the bound lies above its true epsilon with a chance of at most
    1 - ``confidence``.

    Args:
        canaries, guesses, right, delta: as ``p_value``.
        confidence: above 0 and below 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 < confidence < 1:
        raise ValueError("the confidence must be above 0 and below 1")
    chance = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) < chance

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _binomial(count: int, epsilon: float) -> NDArray[np.float64]:
    """Chances of 0, ..., ``count`` successes, each with chance 1 / (1 + e^-epsilon)."""
    hits = np.arange(count + 1)
    # Both logarithms from epsilon itself: 1 minus a chance near 1 would lose its digits.
    success = -math.log1p(math.exp(-epsilon))
    failure = success - epsilon
    chances: NDArray[np.float64] = np.exp(_ways(count) + hits * success + (count - hits) * failure)
    return chances


@lru_cache(maxsize=16)
def _ways(count: int) -> NDArray[np.float64]:
    """Logarithms of the binomial coefficients."""
    factorials = np.array([math.lgamma(number + 1) for number in range(count + 1)])
    ways: NDArray[np.float64] = factorials[count] - factorials - factorials[::-1]
    return ways
