"""Chance of so many right guesses under all that a study claims, not one epsilon alone.

Noise, sampling rate and steps fix an epsilon for every delta: a whole curve. Many guesses are
bound by the middle of it, where epsilon is small, and not by its end at delta 1e-5. The bound is
that of Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run" (ICML 2025;
arXiv:2410.22235), Theorem 3.2 and Algorithm 3, for coins.

Of m coins r are guessed; let p_l be the chance that l are right. Flip the coin of one canary: by
the claim, an event of chance x has then a chance of at most g(x), g increasing and concave. Summed
over the canaries, for each i,

    1/m sum_{l >= i} l p_l <= g(1/m sum_{l >= i} (r - l + 1) p_{l-1}).

Write R_i for the left side and H_i for 1/m sum_{l >= i} (r - l) p_l. So H_{i-1} >= g^-1(R_i), and
R_{i-1} = R_i + (i-1)/(r-i+1) (H_{i-1} - H_i). Suppose that v or more are right with chance t. The
least that R_0 + H_0 can be then comes from all of t lying at v itself and from each H as small as
it may be, since both only grow with what is put further up. It is r/m in truth; where the least is
above that, t is too large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cloister_fl.privacy.accounting import deltas_pld

_EPSILONS = (*np.linspace(0.0, 2.0, 81), *np.linspace(2.1, 8.0, 60), *np.linspace(8.5, 60.0, 104))
_PRECISION = 1e-3
_LEAST = 1e-15


@dataclass(frozen=True)
class Curve:
    """A claim: (epsilon, delta)-DP for each pair, for adding or removing one patient.

    Attributes:
        epsilons: each 0 or more.
        deltas: as many, from 0 to 1.
    """

    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]


@lru_cache(maxsize=16)
def curve_of(noise_multiplier: float, sampling_rate: float, steps: int) -> Curve:
    """What so many noised steps claim; raises as ``accounting.deltas_pld``."""
    epsilons = tuple(map(float, _EPSILONS))
    return Curve(epsilons, deltas_pld(noise_multiplier, sampling_rate, steps, epsilons))


def chance_of(curve: Curve, canaries: int, guesses: int, right: int) -> float:
    """Bound on the chance of ``right`` or more right guesses if the claim holds.

    Args:
        curve: the claim.
        canaries: m, 1 or more: each in the data by a fair coin of its own.
        guesses: r, from 1 to ``canaries``; fixed before anything is seen, which coins are guessed
            is not.
        right: v, from 0 to ``guesses``.

    Raises:
        ValueError: a count is outside its range.
    """
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise ValueError("there are 0 <= right <= guesses <= canaries, and a guess at least")
    if 2 * right <= guesses:
        # Blind guessing does as well.
        return 1.0
    log_growth = np.asarray(curve.epsilons)
    deltas = np.asarray(curve.deltas)
    low, high = 0.0, 1.0
    if not _impossible(log_growth, deltas, canaries, guesses, right, high):
        return 1.0
    # Chances of many guesses span many powers of ten; what is told is the upper end.
    while high - low > _PRECISION * high and high > _LEAST:
        middle = math.sqrt(low * high) if low else high / 1024
        if _impossible(log_growth, deltas, canaries, guesses, right, middle):
            high = middle
        else:
            low = middle
    return high


def _impossible(
    epsilons: NDArray[np.float64],
    deltas: NDArray[np.float64],
    canaries: int,
    guesses: int,
    right: int,
    chance: float,
) -> bool:
    """Whether ``right`` or more right guesses cannot have this chance."""
    growth = np.exp(epsilons)
    least = chance * right / canaries
    wrong = chance * (guesses - right) / canaries
    for place in range(right - 1, -1, -1):
        # g is the least of these lines, so its inverse is the largest of theirs.
        up = float(((least - deltas) / growth).max())
        down = float((1 - deltas - growth * (1 - least)).max())
        more = max(wrong, up, down)
        least += place / (guesses - place) * (more - wrong)
        wrong = more
        if least + wrong > guesses / canaries * (1 + 1e-12):
            # It only grows from here.
            return True
    return False
