"""FedAvgM (Hsu et al. 2019), a server strategy that is not offered: FedAvg with momentum.

What docs/guides/add-a-strategy.md adds. In the product the step stands in the module
``server_strategies``, and its row in ``STRATEGIES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister_fl.server_strategies import Strategy

if TYPE_CHECKING:
    import numpy as np

    from cloister_fl.server_strategies import Moments, Vector


def _fedavgm(
    model: Vector,
    mean: Vector,
    moments: Moments,
    *,
    server_learning_rate: np.float32,
    beta1: np.float32,
) -> tuple[Vector, Moments]:
    (momentum,) = moments
    momentum = beta1 * momentum + mean
    return model + server_learning_rate * momentum, (momentum,)


ROW = Strategy("fedavgm", _fedavgm, ("server_learning_rate", "beta1"), moments=1)

AGGREGATION = """\
[aggregation]
strategy = "fedavgm"
server_learning_rate = 0.5
beta1 = 0.8
"""
"""What a study says to use it."""
