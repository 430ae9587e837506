"""Server optimisers on the flat model: from the mean update of a round to the next model.

FedAvg adds the mean (McMahan et al. 2017, algorithm 1); FedProx differs at the site alone
(Li et al. 2020). FedAdam and FedYogi treat the mean as a gradient (Reddi et al. 2021,
algorithm 2, without bias correction). They see the mean only, so they work just as well on a
sum that secure aggregation has revealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import numpy as np

from cloister_fl.errors import UpdateInvalid
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study.schema import Aggregation


@dataclass(frozen=True)
class OptimizerState:
    """First and second moments, each (D,), zero at the start; unused by FedAvg and FedProx."""

    first: Vector
    second: Vector

    @classmethod
    def fresh(cls, size: int, settings: Aggregation) -> OptimizerState:
        """The state before the first round; moments are kept only where they are used."""
        kept = size if settings.strategy in ("fedadam", "fedyogi") else 0
        return cls(np.zeros(kept, np.float32), np.zeros(kept, np.float32))


def step(
    model: Vector, mean: Vector, state: OptimizerState, settings: Aggregation
) -> tuple[Vector, OptimizerState]:
    """Return the next model and state.

    Args:
        model: the global model, (D,).
        mean: weighted mean of the sites' updates, (D,).
        state: of the round before.
        settings: strategy and its constants.

    Raises:
        UpdateInvalid: the mean has another length or is not finite.
    """
    if mean.shape != model.shape:
        raise UpdateInvalid("The sites' mean update has another length than the model.")
    if not np.isfinite(mean).all():
        raise UpdateInvalid(
            "The sites' mean update is not finite.",
            why="A site's training diverged.",
            remedy="Lower training.learning_rate or aggregation.server_learning_rate.",
        )
    rate = np.float32(settings.server_learning_rate)
    match settings.strategy:
        case "fedavg" | "fedprox":
            return (model + rate * mean).astype(np.float32), state
        case "fedadam":
            square: Vector = mean * mean
            change: Vector = square - state.second
        case "fedyogi":
            square = mean * mean
            change = np.asarray(square * np.sign(square - state.second), np.float32)
        case _:
            assert_never(settings.strategy)
    beta1, beta2 = np.float32(settings.beta1), np.float32(settings.beta2)
    first = np.asarray(beta1 * state.first + (1 - beta1) * mean, np.float32)
    second = np.asarray(state.second + (1 - beta2) * change, np.float32)
    scaled = np.asarray(first / (np.sqrt(second) + np.float32(settings.tau)), np.float32)
    return (model + rate * scaled).astype(np.float32), OptimizerState(first, second)


def averaged(average: Vector, model: Vector, decay: float, rounds: int) -> Vector:
    """Return the exponential moving average of the global models with this round's taken in.

    The bias of a short history is corrected as in Adam (Kingma and Ba 2015, section 3): after r
    rounds the model of round i weighs decay^(r - i), and the weights sum to 1. So the first round
    gives the model itself, and the model before training does not count. It is post-processing.

    Args:
        average: of the rounds before, (D,); in the first round it does not count.
        model: of this round, (D,).
        decay: from 0 up to but not including 1.
        rounds: rounds that gave a model, this one too; 1 or more.
    """
    share = (1 - decay) / (1 - decay**rounds)
    exact = average.astype(np.float64)
    return (exact + share * (model.astype(np.float64) - exact)).astype(np.float32)


def weighted_mean(updates: list[Vector], weights: list[float]) -> Vector:
    """Mean of updates, each (D,), under public weights, summed in float64.

    The order of the list is the order of the sum: callers sort by site, so that every engine
    gives the same bits.
    """
    total = np.zeros(updates[0].shape, np.float64)
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update.astype(np.float64)
    return (total / sum(weights)).astype(np.float32)
