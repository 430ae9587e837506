"""The chance of right guesses under a whole curve: against the linear programme that it solves, and
against mechanisms that keep a curve and tell as much as they can."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linprog

from cloister_fl.client.privacy_audit.trade_off_bound import Curve, chance_of, curve_of

SLACK = 1.002
"""What the search for the chance is too high by at most."""


def programme(curve: Curve, canaries: int, guesses: int, right: int) -> float:
    """The largest chance of ``right`` or more that the inequalities of the theorem leave."""
    lines = [
        line
        for epsilon, delta in zip(curve.epsilons, curve.deltas, strict=True)
        # (slope, constant) of both lines of a pair.
        for line in (
            (math.exp(epsilon), delta),
            (math.exp(-epsilon), 1 - math.exp(-epsilon) * (1 - delta)),
        )
    ]
    rows, bounds = [], []
    for first in range(1, guesses + 1):
        for slope, constant in lines:
            row = np.zeros(guesses + 1)
            for count in range(first, guesses + 1):
                row[count] += count / canaries
                row[count - 1] -= slope * (guesses - count + 1) / canaries
            rows.append(row)
            bounds.append(constant)
    wanted = np.array([-1.0 if count >= right else 0.0 for count in range(guesses + 1)])
    found = linprog(
        wanted,
        A_ub=np.array(rows),
        b_ub=np.array(bounds),
        A_eq=np.ones((1, guesses + 1)),
        b_eq=[1.0],
        bounds=(0, 1),
        method="highs",
    )
    assert found.status == 0
    return float(-found.fun)


@settings(max_examples=60, deadline=None)
@given(
    guesses=st.integers(1, 12),
    more=st.integers(0, 5),
    share=st.floats(0.5, 1),
    epsilons=st.lists(st.floats(0, 4), min_size=1, max_size=4),
    deltas=st.lists(st.floats(0, 0.4), min_size=4, max_size=4),
)
def test_the_recursion_finds_what_the_linear_programme_finds(
    guesses: int, more: int, share: float, epsilons: list[float], deltas: list[float]
) -> None:
    curve = Curve(tuple(epsilons), tuple(deltas[: len(epsilons)]))
    right = math.ceil(share * guesses)
    found = chance_of(curve, guesses + more, guesses, right)
    exact = programme(curve, guesses + more, guesses, right)
    assert exact * (1 - 1e-6) - 1e-9 <= found
    if 2 * right > guesses:
        assert found <= exact * SLACK + 1e-9


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 5, 24, 100])
def test_randomised_response_is_covered(epsilon: float, count: int) -> None:
    told = 1 / (1 + math.exp(-epsilon))
    curve = Curve((epsilon,), (0.0,))
    for right in range(count + 1):
        assert chance_of(curve, count, count, right) >= stats.binom.sf(right - 1, count, told)


@pytest.mark.long
@pytest.mark.parametrize("sigma", [0.5, 1.4, 4.0])
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("count", [3, 24, 200])
def test_a_gaussian_for_each_coin_is_covered(sigma: float, steps: int, count: int) -> None:
    told = stats.norm.cdf(math.sqrt(steps) / sigma / 2)
    curve = curve_of(sigma, 1.0, steps)
    for right in range(count // 2, count + 1):
        assert chance_of(curve, count, count, right) >= stats.binom.sf(right - 1, count, told)


@pytest.mark.parametrize("tells", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("count", [4, 24])
def test_a_mechanism_that_tells_everybody_at_once_is_covered(tells: float, count: int) -> None:
    """With a small chance all coins, else none: the coins' guesses are as dependent as can be."""
    curve = Curve((0.0,), (tells,))
    for right in range(count // 2 + 1, count + 1):
        exact = tells + (1 - tells) * stats.binom.sf(right - 1, count, 0.5)
        assert chance_of(curve, count, count, right) >= exact * (1 - 1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_subsampled_steps_are_covered(rate: float) -> None:
    """One step, one coin: the best guess is right with (1 + total variation) / 2."""
    sigma = 0.6
    points = np.linspace(-12, 13, 200_001)
    absent = stats.norm.pdf(points, 0, sigma)
    present = (1 - rate) * absent + rate * stats.norm.pdf(points, 1, sigma)
    apart = np.trapezoid(np.abs(present - absent), points) / 2
    found = chance_of(curve_of(sigma, rate, 1), 1, 1, 1)
    assert (1 + apart) / 2 * (1 - 1e-6) <= found <= (1 + apart) / 2 * SLACK + 1e-3


def test_more_right_guesses_are_rarer_and_a_larger_claim_bears_more() -> None:
    small, large = curve_of(10.0, 1.0, 60), curve_of(3.0, 1.0, 60)
    chances = [chance_of(small, 60, 60, right) for right in range(30, 61)]
    assert chances[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(chances))
    assert chance_of(large, 60, 60, 55) > chance_of(small, 60, 60, 55)
    # Fewer guesses of as many canaries, all right, show less.
    assert chance_of(small, 60, 20, 20) > chance_of(small, 60, 60, 60)


@pytest.mark.parametrize(
    ("canaries", "guesses", "right"), [(5, 6, 3), (5, 5, 6), (5, 0, 0), (5, 3, -1)]
)
def test_counts_are_checked(canaries: int, guesses: int, right: int) -> None:
    with pytest.raises(ValueError, match="right <= guesses <= canaries"):
        chance_of(Curve((0.0,), (0.0,)), canaries, guesses, right)
