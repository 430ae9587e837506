"""The arithmetic of the one-run audit, against the paper's figures and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.client.privacy_audit.one_run_bound import epsilon_lower, p_value


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [
        # Steinke, Nasr and Jagielski 2023, Appendix D; the paper rounds its figures.
        (100, 100, 75, 0.0, 0.702),
        (100, 100, 75, 1e-4, 0.699),
        (1_000, 100, 75, 1e-4, 0.673),
        # Section 7; here it cuts them off.
        (100_000, 1_510, 1_439, 1e-5, 2.675),
    ],
)
def test_the_papers_own_figures(
    canaries: int, guesses: int, right: int, delta: float, published: float
) -> None:
    found = epsilon_lower(canaries, guesses, right, delta, 0.95)
    assert found == pytest.approx(published, abs=1e-3)


def test_the_papers_own_chance() -> None:
    assert p_value(100, 100, 75, math.log(3), 0.0) == pytest.approx(0.553, abs=5e-4)


@pytest.mark.parametrize("guesses", [1, 8, 100, 1_000, 20_000])
def test_all_right_without_delta_has_a_closed_form(guesses: int) -> None:
    # (e^eps / (1 + e^eps))^r = 0.05
    each = 0.05 ** (1 / guesses)
    expected = max(0.0, math.log(each / (1 - each)))
    assert epsilon_lower(guesses, guesses, guesses, 0.0, 0.95) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("canaries", "guesses", "right"), [(9, 9, 7), (12, 5, 4), (12, 5, 0), (7, 7, 7), (30, 1, 1)]
)
def test_chances_are_the_theorems_in_exact_fractions(
    canaries: int, guesses: int, right: int
) -> None:
    delta, success = Fraction(1, 1_000), Fraction(3, 4)  # epsilon = log 3

    def between(low: int, high: int) -> Fraction:
        """P[low <= W < high]."""
        return sum(
            (
                math.comb(guesses, k) * success**k * (1 - success) ** (guesses - k)
                for k in range(max(low, 0), min(high, guesses + 1))
            ),
            Fraction(0),
        )

    steepest = max(2 * between(right - i, right) / i for i in range(1, canaries + 1))
    exact = min(Fraction(1), between(right, guesses + 1) + canaries * delta * steepest)
    found = p_value(canaries, guesses, right, math.log(3), float(delta))
    assert found == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("count", [10, 60, 400])
def test_randomised_response_is_accused_as_seldom_as_stated(epsilon: float, count: int) -> None:
    """The mechanism for which the theorem is tight: each coin is told rightly with its chance."""
    chance = 1 / (1 + math.exp(-epsilon))
    accused = math.fsum(
        math.comb(count, k) * chance**k * (1 - chance) ** (count - k)
        for k in range(count + 1)
        if epsilon_lower(count, count, k, 0.0, 0.95) > epsilon
    )
    assert accused <= 0.05
    # And not far more seldom than it may be: one guess less would have been too many.
    least = min(k for k in range(count + 2) if k > count or _accuses(count, k, epsilon))
    assert p_value(count, count, least - 1, epsilon, 0.0) > 0.05


def _accuses(count: int, right: int, epsilon: float) -> bool:
    return epsilon_lower(count, count, right, 0.0, 0.95) > epsilon


@st.composite
def audits(draw: st.DrawFn) -> tuple[int, int, int]:
    guesses = draw(st.integers(1, 300))
    right = draw(st.integers(0, guesses))
    return guesses + draw(st.integers(0, 2_000)), guesses, right


@settings(max_examples=80, deadline=None)
@given(audits(), st.floats(0, 8), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_a_mechanism_that_tells_all_with_chance_delta_is_covered(
    audit: tuple[int, int, int], epsilon: float, delta: float
) -> None:
    """It tells every coin, else it is randomised response: this is (epsilon, delta)-DP."""
    plain = p_value(*audit, epsilon, 0.0)
    assert p_value(*audit, epsilon, delta) >= (1 - delta) * plain + delta - 1e-12


@settings(max_examples=80, deadline=None)
@given(audits(), st.sampled_from([0.0, 1e-5, 1e-3]), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_bound_moves_as_it_must(
    audit: tuple[int, int, int], delta: float, confidence: float
) -> None:
    canaries, guesses, right = audit
    found = epsilon_lower(canaries, guesses, right, delta, confidence)
    assert found >= 0
    if found > 0:
        # What is claimed is refuted, and a little more is not.
        assert p_value(canaries, guesses, right, found, delta) < 1 - confidence
        assert p_value(canaries, guesses, right, found + 2e-6, delta) >= 1 - confidence
    if right < guesses:
        assert epsilon_lower(canaries, guesses, right + 1, delta, confidence) >= found
    slack = found + 2e-6
    assert epsilon_lower(canaries + 50, guesses, right, delta, confidence) <= slack
    assert epsilon_lower(canaries, guesses, right, delta + 1e-4, confidence) <= slack
    assert epsilon_lower(canaries, guesses, right, delta, (1 + confidence) / 2) <= slack


def test_blind_guessing_shows_nothing() -> None:
    for guesses in (1, 10, 100, 1_000):
        assert epsilon_lower(1_000, guesses, guesses // 2, 1e-5, 0.95) == 0


@pytest.mark.parametrize(
    ("canaries", "guesses", "right"), [(5, 6, 3), (5, 5, 6), (5, 0, 0), (5, 3, -1)]
)
def test_counts_are_checked(canaries: int, guesses: int, right: int) -> None:
    with pytest.raises(ValueError):
        p_value(canaries, guesses, right, 1.0, 1e-5)
    with pytest.raises(ValueError):
        epsilon_lower(canaries, guesses, right, 1e-5, 0.95)


@pytest.mark.parametrize(("epsilon", "delta"), [(-0.1, 0.0), (math.inf, 0.0), (1.0, 1.0)])
def test_epsilon_and_delta_are_checked(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError):
        p_value(5, 5, 3, epsilon, delta)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_confidence_is_checked(confidence: float) -> None:
    with pytest.raises(ValueError):
        epsilon_lower(5, 5, 3, 0.0, confidence)
