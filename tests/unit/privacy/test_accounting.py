"""Epsilon: published values, bounds against each other, calibration, the lifetime filter."""

from __future__ import annotations

import math
import time
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.errors import EpsilonUnreachable
from cloister_fl.privacy import accounting
from cloister_fl.privacy import renyi_filter as lifetime
from cloister_fl.privacy.accounting import (
    calibrate,
    deltas_pld,
    epsilon_of,
    epsilon_pld,
    epsilon_trajectory,
    rdp_of,
)
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from support.accountants import epsilon_prv, epsilon_rdp
from support.errors import raises

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def alone(sigma: float, q: float, steps: int) -> Composition:
    return ((Mechanism(sigma, q), steps),)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "pld", "rdp"),
    [
        (1.0, 0.02, 1_000, 1e-5, 3.90, 4.32),
        (1.0, 0.02, 10_000, 1e-5, 14.24, 15.32),
        (12.0, 1.0, 60, 1e-4, 2.28, 2.51),
    ],
)
def test_published_values(
    sigma: float, q: float, steps: int, delta: float, pld: float, rdp: float
) -> None:
    assert epsilon_pld(sigma, q, steps, delta) == pytest.approx(pld, abs=0.006)
    assert epsilon_rdp(sigma, q, steps, delta) == pytest.approx(rdp, abs=0.03)


def test_full_participation_is_the_analytic_gaussian() -> None:
    # Balle and Wang 2018, Theorem 8: delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2).
    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    epsilon = epsilon_pld(12.0, 1.0, 60, 1e-5)
    mu = math.sqrt(60) / 12
    delta = phi(-epsilon / mu + mu / 2) - math.exp(epsilon) * phi(-epsilon / mu - mu / 2)
    assert delta == pytest.approx(1e-5, rel=1e-4)
    assert delta <= 1e-5


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [
        (1.0, 0.02, 1_000, 1e-5),
        (0.7, 0.01, 300, 1e-6),
        (2.0, 0.3, 200, 1e-5),
        (12.0, 1.0, 60, 1e-5),
        (0.9, 0.05, 1, 1e-5),
    ],
)
def test_pld_agrees_with_prv(sigma: float, q: float, steps: int, delta: float) -> None:
    pld = epsilon_pld(sigma, q, steps, delta)
    assert pld == pytest.approx(epsilon_prv(sigma, q, steps, delta), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [(1.0, 0.02, 1_000, 1e-5), (2.0, 0.3, 200, 1e-5), (0.9, 0.05, 1, 1e-5), (1.1, 0.05, 180, 1e-6)],
)
def test_a_grid_of_a_ten_thousandth_says_the_same(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    """Ours follows the loss of a step; against a fixed grid it errs upwards, and by little."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    assert epsilon_pld(sigma, q, steps, delta) == pytest.approx(
        accountant.get_epsilon(delta), abs=1e-3
    )


@pytest.mark.long
@settings(max_examples=10, deadline=None)
@given(
    sigma=st.floats(0.6, 20),
    q=st.floats(0.005, 1),
    steps=st.integers(1, 500),
    delta=st.sampled_from([1e-4, 1e-5, 1e-7]),
)
def test_pld_stays_below_rdp_and_the_filter_above_both(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    pld = epsilon_pld(sigma, q, steps, delta)
    assert 0 <= pld <= epsilon_rdp(sigma, q, steps, delta) * (1 + 1e-3) + 1e-9
    assert lifetime.lifetime_epsilon(alone(sigma, q, steps), delta) >= pld


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(sigma=st.floats(0.6, 20), q=st.floats(0.005, 1), steps=st.integers(1, 300))
def test_more_noise_costs_less_and_more_steps_cost_more(sigma: float, q: float, steps: int) -> None:
    here = epsilon_pld(sigma, q, steps, 1e-5)
    assert epsilon_pld(sigma * 1.2, q, steps, 1e-5) <= here * (1 + 1e-3)
    assert epsilon_pld(sigma, q, steps * 2, 1e-5) >= here * (1 - 1e-3)


def test_a_thousand_steps_take_less_than_a_second_of_processor_time() -> None:
    epsilon_pld(1.0, 0.03, 10, 1e-5)
    start = time.process_time()
    epsilon_pld(1.017, 0.02, 1_000, 1e-5)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "arguments",
    [(0, 0.1, 1), (-1, 0.1, 1), (math.nan, 0.1, 1), (1, 0, 1), (1, 1.1, 1), (1, 0.1, -1)],
)
def test_arguments_outside_their_range_are_refused(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError):
        epsilon_pld(*arguments, 1e-5)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta", "exact"),
    [
        # Of Gaussians without sampling, by Balle and Wang 2018.
        (407.971, 200_000, 1e-12, 8.0),
        (90.348, 50_000, 1e-12, 20.0),
        (40.626, 20_000, 1e-12, 30.0),
        (44.72, 500, 1e-12, 3.44916),
        (10.7715, 60, 1e-5, 3.0),
    ],
)
def test_rounding_over_many_steps_does_not_understate_epsilon(
    sigma: float, steps: int, delta: float, exact: float
) -> None:
    """Epsilon was 7.80, 19.83 and 29.92: the transform of the loss had lost up to 4e-12."""
    almost_all = 1 - 1e-13
    assert epsilon_pld(sigma, 1.0, steps, delta) == pytest.approx(exact, rel=1e-4)
    found = epsilon_pld(sigma, almost_all, steps, delta)
    assert found >= exact * (1 - 1e-4)
    if steps >= 20_000:
        assert found == math.inf
        with raises(EpsilonUnreachable):
            calibrate(exact, delta, almost_all, steps)
    else:
        assert found <= exact * 1.02


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(delta: float) -> None:
    for function in (epsilon_pld, epsilon_rdp, epsilon_prv):
        with pytest.raises(ValueError):
            function(1.0, 0.1, 1, delta)


def test_nothing_costs_nothing_and_what_cannot_be_bounded_is_infinite() -> None:
    assert epsilon_pld(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon_of((), 1e-5) == 0
    assert epsilon_pld(1.0, 0.1, 10, 1e-15) == math.inf
    assert epsilon_pld(0.01, 0.3, 1_000, 1e-5) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "q", "steps"), [(1.0, 1.0, 1), (10.8, 1.0, 60), (0.8, 0.05, 40), (1.7, 0.1, 100)]
)
def test_deltas_and_epsilons_are_of_one_curve(sigma: float, q: float, steps: int) -> None:
    for delta in (1e-7, 1e-5, 1e-3, 0.05):
        epsilon = epsilon_pld(sigma, q, steps, delta)
        # Both are upper bounds, on grids of their own.
        (found,) = deltas_pld(sigma, q, steps, [epsilon])
        assert found == pytest.approx(delta, rel=0.02)
    deltas = deltas_pld(sigma, q, steps, [0.0, 0.5, 1.0, 4.0, 50.0])
    assert all(1 >= one >= 0 for one in deltas)
    assert list(deltas) == sorted(deltas, reverse=True)
    # At epsilon 0 it is the total variation: of one Gaussian, in closed form.
    if q == 1:
        apart = math.erf(math.sqrt(steps) / sigma / (2 * math.sqrt(2)))
        assert deltas[0] == pytest.approx(apart, rel=1e-9)


def test_gdp_is_not_offered() -> None:
    assert not any("gdp" in name.lower() for name in dir(accounting))


def test_composition_merges_equal_mechanisms() -> None:
    one, two = Mechanism(1.0, 0.1), Mechanism(2.0, 0.1)
    assert compose(((two, 3), (one, 1)), ((two, 4),), ((one, 0),)) == ((one, 1), (two, 7))
    assert compose(((one, 0),)) == ()
    both = epsilon_of(((one, 20), (two, 30)), 1e-5)
    assert max(epsilon_pld(1, 0.1, 20, 1e-5), epsilon_pld(2, 0.1, 30, 1e-5)) < both
    assert both < epsilon_pld(1, 0.1, 50, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [(3.0, 1e-5, 1.0, 20), (8.0, 1e-5, 0.02, 300), (0.5, 1e-6, 0.1, 40), (40.0, 1e-4, 0.3, 30)],
)
def test_calibration_is_tight(epsilon: float, delta: float, q: float, steps: int) -> None:
    sigma = calibrate(epsilon, delta, q, steps)
    assert sigma == round(sigma, 4)
    assert epsilon_pld(sigma, q, steps, delta) <= epsilon
    assert epsilon_pld(sigma - 1e-4, q, steps, delta) > epsilon


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(epsilon=st.floats(0.2, 20), steps=st.integers(1, 200), q=st.sampled_from([0.05, 1.0]))
def test_calibration_is_monotone(epsilon: float, steps: int, q: float) -> None:
    sigma = calibrate(epsilon, 1e-5, q, steps)
    assert epsilon_pld(sigma, q, steps, 1e-5) <= epsilon
    assert calibrate(epsilon * 1.1, 1e-5, q, steps) <= sigma
    assert calibrate(epsilon, 1e-5, q, steps + 20) >= sigma


@pytest.mark.long
@pytest.mark.parametrize(("q", "steps"), [(1.0, 20), (0.25, 8)])
@pytest.mark.parametrize("epsilon", [0.06, 0.04, 0.01])
def test_an_epsilon_below_what_renyi_accounting_can_tell_is_reached(
    epsilon: float, q: float, steps: int
) -> None:
    """Its orders end at 256, so it says log(1/delta)/255 = 0.045 or more, whatever the noise."""
    sigma = calibrate(epsilon, 1e-5, q, steps)
    assert epsilon_pld(sigma, q, steps, 1e-5) <= epsilon
    assert epsilon_pld(sigma * 0.99, q, steps, 1e-5) > epsilon
    if q == 1:
        # Gaussians compose to one, whose delta has a closed form (Balle and Wang 2018).
        mu = math.sqrt(steps) / sigma
        normal = NormalDist()
        delta = normal.cdf(mu / 2 - epsilon / mu)
        delta -= math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-5, rel=1e-2)


def test_what_no_noise_can_give_is_refused() -> None:
    with raises(EpsilonUnreachable, match="No noise"):
        calibrate(1e-2, 1e-5, 1.0, 10**10)
    with raises(EpsilonUnreachable, match="Epsilon 1e-09 is too small"):
        calibrate(1e-9, 1e-5, 0.1, 20)
    with raises(EpsilonUnreachable, match="too small"):
        calibrate(1.0, 1e-14, 1.0, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "q", "a_round", "rounds"), [(12.0, 1.0, 2, 70), (1.1, 0.05, 3, 60)]
)
def test_trajectory_never_understates_nor_falls(
    sigma: float, q: float, a_round: int, rounds: int
) -> None:
    trajectory = epsilon_trajectory(sigma, q, a_round, rounds, 1e-5)
    assert len(trajectory) == rounds
    assert list(trajectory) == sorted(trajectory)
    assert trajectory[-1] == epsilon_pld(sigma, q, a_round * rounds, 1e-5)
    for number in (1, 2, 3, 20, 45, rounds - 1):
        exact = epsilon_pld(sigma, q, a_round * number, 1e-5)
        assert exact * (1 - 1e-3) <= trajectory[number - 1] <= exact * 1.1


def test_filter_uses_the_divergence_of_opacus() -> None:
    # A second implementation of the same sum, as `verify` uses it.
    from opacus.accountants.analysis.rdp import compute_rdp

    composition = compose(alone(1.1, 0.03, 400), alone(9.0, 1.0, 30))
    ours = rdp_of(composition, lifetime.ORDERS)
    theirs = [
        compute_rdp(q=0.03, noise_multiplier=1.1, steps=400, orders=order)
        + compute_rdp(q=1.0, noise_multiplier=9.0, steps=30, orders=order)
        for order in lifetime.ORDERS
    ]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_filter_fits_exactly_up_to_its_own_reading() -> None:
    spent, proposed = alone(8.0, 1.0, 40), alone(1.2, 0.05, 100)
    exact = lifetime.lifetime_epsilon(compose(spent, proposed), 1e-6)
    assert lifetime.would_fit(spent, proposed, exact, 1e-6)
    assert not lifetime.would_fit(spent, proposed, math.nextafter(exact, 0), 1e-6)
    assert lifetime.would_fit((), (), 0.0, 1e-6)


def test_filter_splits_delta_over_its_orders() -> None:
    spent = alone(8.0, 1.0, 40)
    single = [lifetime.lifetime_epsilon(spent, 1e-6 / 8, orders=(o,)) for o in lifetime.ORDERS]
    assert lifetime.lifetime_epsilon(spent, 1e-6) == min(single)
    # The price of not choosing an order is small, and it is never below the Renyi figure.
    assert epsilon_rdp(8.0, 1.0, 40, 1e-6) <= min(single) <= epsilon_rdp(8.0, 1.0, 40, 1e-6) * 1.2


@pytest.mark.parametrize("orders", [(), (1.0,), (math.inf,), (0.5, 2.0)])
def test_filter_refuses_orders_that_are_none(orders: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        lifetime.lifetime_epsilon(alone(1.0, 1.0, 1), 1e-5, orders=orders)
