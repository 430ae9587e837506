"""The server's part of a round: from the sites' updates to the next model.

What a strategy does with the mean update is a row of ``server_strategies.STRATEGIES``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cloister_fl.errors import UpdateInvalid
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.server_strategies import STRATEGIES
from cloister_fl.study.schema import Aggregation


@dataclass(frozen=True)
class OptimizerState:
    """Moments of a strategy, each (D,), zero at the start; of no length where it keeps none."""

    first: Vector
    second: Vector

    @classmethod
    def fresh(cls, size: int, settings: Aggregation) -> OptimizerState:
        """The state before the first round; moments are kept only where they are used."""
        kept = STRATEGIES[settings.strategy].moments
        return cls(*(np.zeros(size if kept > place else 0, np.float32) for place in range(2)))


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
    strategy = STRATEGIES[settings.strategy]
    parameters = {key: np.float32(getattr(settings, key)) for key in strategy.parameters}
    both = (state.first, state.second)
    moved, kept = strategy.step(model, mean, both[: strategy.moments], **parameters)
    moments = [np.asarray(one, np.float32) for one in (*kept, *both[strategy.moments :])]
    return moved.astype(np.float32), OptimizerState(*moments)


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
