"""How large the mean update of a round can be, where every site is honest and privacy is on.

A site that sends random numbers in place of its masked vector spoils the sum, and nobody can see
whose they were. But the sum itself can be held against what clipping, noise and weights allow: a
public function of the study's constants, which tells nothing of anybody's data.

Two bounds:

- *A coordinate* of an encoded update is cut to ``aggregation.clip``, so a mean of them is within
  it, whatever was trained. A random element of the ring lies outside in nearly every coordinate
  that the room above the clip takes up.
- *The L2 norm*, by the optimiser. With gradient descent a round moves the weights by a linear
  function of its noised gradients: with R(k) what a gradient of 1 has moved a weight by after k
  steps, momentum and FedProx's pull included, the update is -(sum over steps of R times (sum of
  clipped gradients + sigma C Z) / divisor). The clipped gradients add at most C times the patients
  who were sampled, of whom a site has no more than ``1 / (10 delta)``: its policy refuses any
  larger delta for its patients. How many are sampled is bounded by Bernstein's inequality
  (Boucheron, Lugosi and Massart, *Concentration Inequalities*, 2013, section 2.8), the noise by the
  tail of a chi-square variable (Laurent and Massart, *Adaptive estimation of a quadratic functional
  by model selection*, Annals of Statistics 28 (2000), lemma 1). A step of Adam is bounded whatever
  the gradients are: by Cauchy and Schwarz, m is at most a constant times the root of v (cf. Kingma
  and Ba 2015, section 2.1).

An honest round lies outside with a chance of at most ``CHANCE``. A site that keeps within the
bounds can still send a poisoned update: they catch what spoils a sum, not what bends it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study

CHANCE = 2.0**-40
"""Most probability that an honest round lies outside."""

_PARTS = 3
"""How often the chance is spent: on who is sampled, on the noise, on values that are cut."""
_BETA1, _BETA2 = 0.9, 0.999
"""Of torch's Adam, which the sites run with its defaults."""
_FLOAT32 = 2.0**-22
"""What a step of float32 arithmetic errs by, four times over, of the values it works on."""
_GRID = 2.0**-31
"""What rounding to the grid of the noised sum moves a value by, in clipping norms."""


@dataclass(frozen=True)
class UpdateBound:
    """What the mean update of a round is within.

    Attributes:
        norm: most L2 norm; infinite where no bound is known.
        coordinate: most absolute value of a coordinate; infinite where updates are not encoded.
    """

    norm: float
    coordinate: float

    def holds(self, norm: float, coordinate: float) -> bool:
        """Whether a mean update is within, by its L2 norm and its largest absolute value."""
        # Also not where one of them is no number.
        return norm <= self.norm and coordinate <= self.coordinate


def update_bound(
    study: Study,
    *,
    dimension: int,
    weights: Sequence[float],
    round_number: int,
    model_norm: float,
) -> UpdateBound:
    """Return what the mean update of a round is within.

    Args:
        study: with privacy on.
        dimension: D, parameters of the network.
        weights: public weight of each site in the sum.
        round_number: from 1; the learning rate may follow it.
        model_norm: L2 norm of the weights that the round begins with, for rounding alone.

    Raises:
        ValueError: the study's privacy is off: then nothing is clipped, and there is no bound.
        EpsilonUnreachable: no noise gives the study's epsilon.
    """
    if not study.privacy.enabled:
        raise ValueError("a study without privacy clips nothing")
    aggregation = study.aggregation
    coordinate = math.inf
    if aggregation.secure:
        # Each site rounds to a unit, of which there are thousands of millions to the clip.
        coordinate = aggregation.clip * (1 + 2.0**-16)
    norm = min(
        _adam(study, dimension, round_number)
        if study.training.optimizer == "adam"
        else _descent(study, dimension, weights, round_number),
        math.sqrt(dimension) * coordinate,
    )
    steps = study.training.steps_per_round
    slack = _FLOAT32 * (steps + len(weights)) * (model_norm + norm)
    return UpdateBound(norm * (1 + 2.0**-10) + slack, coordinate)


def _descent(study: Study, dimension: int, weights: Sequence[float], round_number: int) -> float:
    """Of gradient descent, with momentum and the pull of FedProx, which are linear."""
    training, clip = study.training, study.privacy.clipping_norm
    rate, steps = training.rate_of(round_number), training.steps_per_round
    moved, squares = response(rate, training.momentum, study.aggregation.proximal_mu, steps)
    unlikely = CHANCE / _PARTS / len(weights)
    sampled = most_sampled(
        math.floor((1 + 1e-9) / (10 * study.privacy.delta)) or 1,
        training.sampling_rate,
        unlikely / steps,
    )
    unit = clip / training.expected_batch
    signal = unit * moved * (sampled + _GRID * math.sqrt(dimension))
    noise = charges(study).step.noise_multiplier * unit * math.sqrt(squares)
    # The largest value of a site's update: its signal, and the tail of one Gaussian.
    highest = signal + noise * math.sqrt(2 * math.log(2 * dimension / unlikely))
    if study.aggregation.secure and not highest <= study.aggregation.clip:
        # Cut values are no sum of signal and noise any more; their norm is still no larger.
        return signal + noise * math.sqrt(chi_square_tail(dimension, unlikely))
    share = math.sqrt(sum(weight**2 for weight in weights)) / sum(weights)
    return signal + noise * share * math.sqrt(chi_square_tail(dimension, CHANCE / _PARTS))


def _adam(study: Study, dimension: int, round_number: int) -> float:
    """Of Adam: each coordinate of each step is bounded, whatever the gradients are."""
    rate = study.training.rate_of(round_number)
    return math.sqrt(dimension) * rate * _adam_moves(study.training.steps_per_round)


@functools.lru_cache(maxsize=8)
def _adam_moves(steps: int) -> float:
    total = series = 0.0
    for step in range(1, steps + 1):
        series += (_BETA1**2 / _BETA2) ** (step - 1)
        largest = (1 - _BETA1) / math.sqrt(1 - _BETA2) * math.sqrt(series)
        total += largest * math.sqrt(1 - _BETA2**step) / (1 - _BETA1**step)
    return total


@functools.lru_cache(maxsize=8)
def response(rate: float, momentum: float, mu: float, steps: int) -> tuple[float, float]:
    """How far a gradient of 1 in any one step moves a weight by the round's end, over the steps.

    Args:
        rate: learning rate.
        momentum: of gradient descent, as torch has it.
        mu: FedProx's pull towards the weights at the start.
        steps: of the round.

    Returns:
        The sum of the absolute values over all steps, and the sum of their squares; infinite where
        the recursion diverges.
    """
    weight = speed = moved = squares = 0.0
    for step in range(steps):
        speed = momentum * speed + float(step == 0) + mu * weight
        weight -= rate * speed
        moved += abs(weight)
        squares += weight * weight
        if not math.isfinite(squares):
            return math.inf, math.inf
    return moved, squares


def most_sampled(patients: int, rate: float, chance: float) -> float:
    """The most patients of a Poisson sample, but for a chance; Bernstein's inequality.

    Args:
        patients: how many there are at most.
        rate: with which each joins, independently.
        chance: above 0.
    """
    expected, level = patients * rate, -math.log(chance)
    return min(
        float(patients), expected + level / 3 + math.sqrt(level**2 / 9 + 2 * expected * level)
    )


def chi_square_tail(dimension: int, chance: float) -> float:
    """What a chi-square variable exceeds with at most a chance (Laurent and Massart 2000).

    Args:
        dimension: degrees of freedom.
        chance: above 0.
    """
    level = -math.log(chance)
    return dimension + 2 * math.sqrt(dimension * level) + 2 * level
