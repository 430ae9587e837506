"""The bound on a round's mean update: no honest round exceeds it, and it says something."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study
from cloister_fl.study.update_bound import (
    UpdateBound,
    chi_square_tail,
    most_sampled,
    response,
    update_bound,
)
from support import studies

SITES = 4
D = 40


def bound_of(study: Study, dimension: int = D, model_norm: float = 0.0) -> UpdateBound:
    return update_bound(
        study, dimension=dimension, weights=[1.0] * SITES, round_number=1, model_norm=model_norm
    )


def asked(training: str = "", aggregation: str = "", privacy: str = "") -> Study:
    # Few patients to a site by its delta, so that a search can fill it.
    return studies.study(
        training=training, aggregation=aggregation, privacy=f"delta = 1e-3\n{privacy}"
    )


def patients_of(study: Study) -> int:
    return math.floor(1 / (10 * study.privacy.delta) + 1e-6)


def honest_update(
    study: Study, rng: np.random.Generator, direction: np.ndarray, *, noise: float
) -> np.ndarray:
    """What a site can send at most: each patient's gradient has the clipping norm, all one way.

    By torch's own optimisers, as the sites run them.
    """
    training, clip = study.training, study.privacy.clipping_norm
    weight = torch.nn.Parameter(torch.zeros(D))
    rate = training.rate_of(1)
    optimizer = (
        torch.optim.Adam([weight], lr=rate)
        if training.optimizer == "adam"
        else torch.optim.SGD([weight], lr=rate, momentum=training.momentum)
    )
    for step in range(training.steps_per_round):
        drawn = int(rng.binomial(patients_of(study), training.sampling_rate))
        way = direction if direction.ndim == 1 else direction[step]
        total = drawn * clip * way + noise * clip * rng.standard_normal(D)
        gradient = torch.from_numpy((total / training.expected_batch).astype(np.float32))
        weight.grad = gradient + study.aggregation.proximal_mu * weight.detach()
        optimizer.step()
    update = weight.detach().numpy().astype(np.float64)
    if study.aggregation.secure:
        update = np.clip(update, -study.aggregation.clip, study.aggregation.clip)
    return update


CASES = [
    ("steps = 1", ""),
    ("steps = 7\nsampling_rate = 0.3", ""),
    ("steps = 5\nmomentum = 0.9", ""),
    ("steps = 6\nmomentum = 0.5", 'strategy = "fedprox"\nproximal_mu = 0.7'),
    ("steps = 9\nlearning_rate = 0.9", 'strategy = "fedprox"\nproximal_mu = 2.0'),
    ("steps = 3\nlearning_rate = 50.0\nexpected_batch = 1", "clip = 0.5"),
    ('steps = 4\nlearning_rate = 0.01\nschedule = "cosine"', "secure = false"),
    ('steps = 1\nlearning_rate = 0.01\noptimizer = "adam"', ""),
    ('steps = 12\nlearning_rate = 0.01\noptimizer = "adam"', ""),
]


@pytest.mark.long
@pytest.mark.parametrize(("training", "aggregation"), CASES)
def test_the_worst_honest_rounds_that_a_search_finds_stay_within(
    training: str, aggregation: str
) -> None:
    study = asked(training, aggregation)
    sigma, bound = charges(study).step.noise_multiplier, bound_of(study)
    rng = np.random.default_rng(5)
    worst = 0.0
    for trial in range(60):
        # All patients of all sites one way; a way that turns each step; each site its own.
        way = rng.standard_normal((study.training.steps_per_round, D) if trial % 3 == 1 else D)
        way /= np.linalg.norm(way, axis=-1, keepdims=True)
        updates = [
            honest_update(
                study,
                rng,
                way if trial % 3 < 2 else rng.permutation(way),
                noise=sigma if trial % 2 else 0.0,
            )
            for _ in range(SITES)
        ]
        mean = np.mean(updates, axis=0)
        norm, largest = float(np.linalg.norm(mean)), float(np.abs(mean).max())
        assert bound.holds(norm, largest), (norm, largest, bound)
        worst = max(worst, norm / bound.norm)
    # Else it would be no bound to speak of.
    assert worst > 0.1, worst


@pytest.mark.long
def test_no_sequence_of_gradients_makes_adam_exceed_its_bound() -> None:
    """Steps grow fastest where gradients do: the search climbs there from many starts."""
    steps = 8
    study = asked(f'steps = {steps}\nlearning_rate = 1.0\noptimizer = "adam"', "clip = 1000.0")
    most = bound_of(study, dimension=1).norm

    def moved(gradients: np.ndarray) -> float:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adam([weight], lr=1.0)
        for gradient in gradients:
            weight.grad = torch.tensor([gradient])
            optimizer.step()
        return abs(float(weight.detach()))

    rng = np.random.default_rng(3)
    best = np.ones(steps)
    for growth in (1.0, 1.5, 3.0, 10.0, 100.0):
        start = growth ** np.arange(steps)
        best = max(best, start, key=moved)
    for _ in range(300):
        other = best * np.exp(rng.normal(0, 0.4, steps))
        best = max(best, other, key=moved)
    assert 0.5 * most < moved(best) <= most


def test_a_random_element_of_the_ring_is_outside() -> None:
    """Of any number of sites: the room above the clip is smallest just below a power of two."""
    from cloister_fl.secagg import fixed_point

    rng = np.random.default_rng(1)
    for sites, clip in ((5, 8.0), (7, 9.0), (8, 8.0), (20, 1.0), (31, 8.2)):
        study = studies.study(aggregation=f"clip = {clip}")
        scale = fixed_point.scale_for(sites, 1.0, clip)
        for dimension in (1281, 16_000):
            total = rng.integers(0, 2**32, dimension, dtype=np.uint32)
            mean = fixed_point.decode(total, divisor=scale * sites)
            bound = update_bound(
                study,
                dimension=dimension,
                weights=[1.0] * sites,
                round_number=1,
                model_norm=10.0,
            )
            assert not bound.holds(float(np.linalg.norm(mean)), float(np.abs(mean).max()))


def test_a_vector_of_random_values_within_the_clip_is_outside_by_its_norm() -> None:
    study, dimension = studies.study(), 16_000
    values = np.random.default_rng(2).uniform(-8, 8, dimension) / 5
    bound = update_bound(
        study, dimension=dimension, weights=[1.0] * 5, round_number=1, model_norm=10.0
    )
    assert np.abs(values).max() <= bound.coordinate
    assert not bound.holds(float(np.linalg.norm(values)), float(np.abs(values).max()))
    assert not bound.holds(math.nan, 0.0)


def test_the_response_is_torch_s_own() -> None:
    for rate, momentum, mu, steps in ((0.5, 0.0, 0.0, 4), (0.2, 0.9, 0.0, 6), (0.3, 0.6, 0.8, 7)):
        moves = []
        for place in range(steps):
            weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
            for step in range(steps):
                weight.grad = float(step == place) + mu * weight.detach()
                optimizer.step()
            moves.append(float(weight.detach()))
        found = response(rate, momentum, mu, steps)
        assert found == pytest.approx((np.abs(moves).sum(), np.square(moves).sum()), rel=1e-12)
    # A pull beyond what a step can follow: no bound but that of the coordinates.
    assert response(10.0, 0.0, 1000.0, 400) == (math.inf, math.inf)
    diverging = asked(
        "steps = 400\nlearning_rate = 10.0", 'strategy = "fedprox"\nproximal_mu = 1000.0'
    )
    assert bound_of(diverging).norm == pytest.approx(8.0 * math.sqrt(D), rel=0.01)


@pytest.mark.parametrize("chance", [1e-2, 1e-6, 2.0**-40])
def test_the_tails_are_no_heavier_than_they_say(chance: float) -> None:
    # The chi-square tail of an even number of degrees is a sum of Poisson terms.
    for half in (1, 2, 8, 60):
        level = chi_square_tail(2 * half, chance) / 2
        logs = [-level + k * math.log(level) - math.lgamma(k + 1) for k in range(half)]
        assert sum(map(math.exp, logs)) <= chance
    # The binomial's, summed.
    for patients, rate in ((10, 0.5), (1000, 0.02), (400, 0.9), (7, 1.0)):
        most = most_sampled(patients, rate, chance)
        tail = sum(
            math.comb(patients, k) * rate**k * (1 - rate) ** (patients - k)
            for k in range(math.floor(most) + 1, patients + 1)
        )
        assert tail <= chance
        assert most <= patients


def test_without_privacy_there_is_no_bound() -> None:
    with pytest.raises(ValueError, match="clips nothing"):
        bound_of(studies.study(privacy="enabled = false"))
