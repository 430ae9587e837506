"""Server strategies that a study may name: from the mean update of a round to the next model.

FedAvg adds the mean (McMahan et al. 2017, algorithm 1); FedProx differs at the site alone (Li et
al. 2020). FedAdam and FedYogi treat the mean as a gradient (Reddi et al. 2021, algorithm 2, without
bias correction). They see the mean only, so they work just as well on a sum that secure aggregation
has revealed.

A strategy is one row of ``STRATEGIES``: the study's schema and the server read it, and
docs/guides/add-a-strategy.md says how to add one. numpy is loaded when a step is taken, and no
sooner: a study is checked where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.float32]
    Moments: TypeAlias = tuple[Vector, ...]
    Step: TypeAlias = Callable[..., tuple[Vector, Moments]]

MOST_MOMENTS = 2
"""Vectors that a checkpoint has a place for."""


@dataclass(frozen=True)
class Strategy:
    """A server strategy.

    Attributes:
        name: what a study writes.
        step: from the global model, the mean update and the moments, each (D,) of float32, and the
            parameters by name, to the next model and moments. It changes none of them in place.
        parameters: keys of a study's ``[aggregation]`` that the step takes, as float32.
        moments: vectors that are kept from round to round, zero at the start; 0 to 2.
        proximal: whether sites pull their weights towards the global model (``proximal_mu``).
    """

    name: str
    step: Step
    parameters: tuple[str, ...]
    moments: int = 0
    proximal: bool = False


def _mean(
    model: Vector, mean: Vector, moments: Moments, *, server_learning_rate: np.float32
) -> tuple[Vector, Moments]:
    return model + server_learning_rate * mean, moments


def _fedadam(
    model: Vector,
    mean: Vector,
    moments: Moments,
    *,
    server_learning_rate: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    tau: np.float32,
) -> tuple[Vector, Moments]:
    first, second = moments
    first = beta1 * first + (1 - beta1) * mean
    second = second + (1 - beta2) * (mean * mean - second)
    return _adaptive(model, first, second, server_learning_rate, tau)


def _fedyogi(
    model: Vector,
    mean: Vector,
    moments: Moments,
    *,
    server_learning_rate: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    tau: np.float32,
) -> tuple[Vector, Moments]:
    import numpy as np

    first, second = moments
    square = mean * mean
    first = beta1 * first + (1 - beta1) * mean
    second = second + (1 - beta2) * (square * np.sign(square - second))
    return _adaptive(model, first, second, server_learning_rate, tau)


def _adaptive(
    model: Vector, first: Vector, second: Vector, rate: np.float32, tau: np.float32
) -> tuple[Vector, Moments]:
    import numpy as np

    scaled = np.asarray(first / (np.sqrt(second) + tau), np.float32)
    return model + rate * scaled, (first, second)


_RATE = "server_learning_rate"

STRATEGIES: Mapping[str, Strategy] = {
    row.name: row
    for row in (
        Strategy("fedavg", _mean, (_RATE,)),
        Strategy("fedprox", _mean, (_RATE,), proximal=True),
        Strategy("fedadam", _fedadam, (_RATE, "beta1", "beta2", "tau"), moments=2),
        Strategy("fedyogi", _fedyogi, (_RATE, "beta1", "beta2", "tau"), moments=2),
    )
}
"""The strategies by name."""
